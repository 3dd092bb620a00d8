//! `docs/database.md` against the schema: every table and column, and every query, as they stand there.

use std::collections::BTreeMap;
use std::path::Path;

use super::tests::{name, new_run, store_with_run};
use super::*;

/// Columns with their types, by table.
type Tables = BTreeMap<String, BTreeMap<String, String>>;

fn page() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/database.md");
    std::fs::read_to_string(path).unwrap()
}

/// The tables of the page: a heading with the name, and a row for each column.
fn documented(page: &str) -> Tables {
    let mut tables = Tables::new();
    let mut table = None;
    for line in page.lines() {
        if let Some(heading) = line.strip_prefix("## ") {
            let name = heading.strip_prefix('`').and_then(|h| h.strip_suffix('`'));
            table = name.map(str::to_owned);
        }
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        if let (Some(table), ["", column, kind, meaning, ""]) = (&table, &cells[..])
            && column.starts_with('`')
        {
            assert!(!meaning.is_empty(), "{line}");
            let columns = tables.entry(table.clone()).or_default();
            let column = column.trim_matches('`').to_owned();
            let before = columns.insert(column, (*kind).to_owned());
            assert_eq!(before, None, "twice: {line}");
        }
    }
    tables
}

fn actual(store: &Store) -> Tables {
    let sql = "SELECT m.name, c.name, c.type FROM sqlite_schema m JOIN pragma_table_info(m.name) c
               WHERE m.type = 'table' AND m.name NOT LIKE 'sqlite_%'";
    let rows = store.query(sql, [], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)));
    let mut tables = Tables::new();
    for (table, column, kind) in rows.unwrap() {
        let table: String = table;
        tables.entry(table).or_default().insert(column, kind);
    }
    tables
}

#[test]
fn the_page_has_every_table_and_column() {
    let (_dir, store) = store_with_run("books-1");
    let page = page();
    assert_eq!(documented(&page), actual(&store));
    let version = format!("This page is version {SCHEMA_VERSION}.");
    assert!(page.contains(&version), "{version}");
    let application: i64 = store
        .query_one("PRAGMA application_id", [], |row| row.get(0))
        .unwrap();
    assert!(
        page.contains(&format!("is {application} (")),
        "{application}"
    );
}

/// Two runs with a row of everything that the queries ask for.
fn filled() -> (tempfile::TempDir, Store) {
    let (dir, store) = store_with_run("books-1");
    store.create_run(&new_run("books-2"), 2).unwrap();
    for run in ["books-1", "books-2"].map(name) {
        for step in 1..=250 {
            let row = StepRow {
                step,
                horizon: 250,
                loss: 5.0 - step as f64 / 100.0,
                grad_norm: 1.0,
                learning_rate: 0.1,
                tokens: 64 * step,
                tokens_per_second: 100.0,
                epoch: 0.1,
                bits_per_byte: None,
                mfu: None,
                skipped: false,
                time_ms: 1000 * step + if step > 99 { 5000 } else { 0 },
            };
            store.record_step(&run, &row).unwrap();
        }
        let eval = EvalRow {
            step: 0,
            split: "validation".into(),
            loss: 6.0,
            bits_per_byte: None,
            weight: 1.0,
            bytes: 1,
            confusion: Vec::new(),
        };
        store.record_eval(&run, &eval).unwrap();
        let sample = SampleRow {
            step: 0,
            prompt: 0,
            text: "words".into(),
        };
        store.record_sample(&run, &sample).unwrap();
        for (worker, compute_us) in [("w1", 400_000), ("w2", 800_000)] {
            let times = WorkerTimesRow {
                worker: worker.into(),
                step: 9,
                time_ms: 9000,
                host: "host".into(),
                device: "cpu".into(),
                tokens: 1000,
                compute_us,
                exchange_us: 0,
                wait_us: 1_000_000 - compute_us,
                data_us: 0,
            };
            store.record_worker_times(&run, &times).unwrap();
            let fault = FaultRow {
                step: 5,
                time_ms: 5000,
                kind: "redone".into(),
                worker: worker.into(),
                text: "words".into(),
                delay_ms: Some(250),
            };
            store.record_fault(&run, &fault).unwrap();
        }
        let lanes = BTreeMap::from([("w1".to_owned(), vec![0, 1, 2]), ("w2".into(), vec![3])]);
        store.record_assignment(&run, 3, 1, &lanes).unwrap();
        let checkpoint = CheckpointRow {
            step: 250,
            path: "there".into(),
            bytes: 1,
            val_loss: Some(2.0),
            state_hash: [7; 32],
            time_ms: 1,
        };
        store.record_checkpoint(&run, &checkpoint).unwrap();
    }
    (dir, store)
}

#[test]
fn every_query_of_the_page_finds_something() {
    let (_dir, store) = filled();
    let reader = Store::open_read_only(store.path()).unwrap();
    let page = page();
    let blocks = page.split("```sql\n").skip(1);
    let queries: Vec<&str> = blocks
        .filter_map(|block| block.split("```").next())
        .collect();
    assert!(queries.len() >= 10, "{}", queries.len());
    for query in &queries {
        let rows = reader.query(query, [], |row| row.get::<_, rusqlite::types::Value>(0));
        let rows = rows.unwrap_or_else(|error| panic!("{query}: {error:?}"));
        assert!(!rows.is_empty(), "nothing: {query}");
    }
    let slowest = queries.iter().find(|query| query.contains("worker_times"));
    let row = reader.query_one(slowest.expect("a query"), [], |row| {
        Ok((
            row.get::<_, String>(0)?,
            row.get::<_, f64>(3)?,
            row.get::<_, f64>(4)?,
        ))
    });
    assert_eq!(row.unwrap(), ("w2".into(), 1250.0, 0.2));
    let longest = queries.iter().find(|query| query.contains("lag(time_ms)"));
    let row = reader.query_one(longest.expect("a query"), [], |row| {
        Ok((row.get::<_, i64>(0)?, row.get::<_, f64>(1)?))
    });
    assert_eq!(row.unwrap(), (100, 6.0));
}
