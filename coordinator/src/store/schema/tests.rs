//! Databases of other times: older ones keep their content, newer and foreign ones are refused and left alone.

use std::fs;

use cohort_common::api::RunEvent;

use super::super::tests::{name, spec, store_with_run};
use super::*;

#[test]
fn a_database_is_opened_again_and_read_beside_its_writer() {
    let (dir, store) = store_with_run("tiny-1");
    let path = dir.path().join("cohort.db");
    let reader = Store::open_read_only(&path).unwrap();
    assert_eq!(reader.run(&name("tiny-1")).unwrap().name, name("tiny-1"));
    assert!(matches!(
        reader.delete_run(&name("tiny-1")),
        Err(StoreError::Sql { .. })
    ));
    drop((reader, store));
    assert_eq!(Store::open(&path).unwrap().runs().unwrap().len(), 1);
    assert_eq!(
        Store::open_read_only(&path).unwrap().runs().unwrap().len(),
        1
    );
}

#[test]
fn a_database_is_read_where_nothing_can_be_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("odd name?%#").join("cohort.db");
    fs::create_dir(path.parent().unwrap()).unwrap();
    drop(Store::open(&path).unwrap());
    let store = Store::connect_read_only(&path, true).unwrap();
    assert_eq!(store.runs().unwrap(), []);
    assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
}

#[test]
fn a_database_of_version_1_keeps_its_content() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cohort.db");
    let json = serde_json::to_string(&spec()).unwrap();
    let old = Connection::open(&path).unwrap();
    old.execute_batch(&format!(
        "{VERSION_1};
         PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = 1;
         INSERT INTO runs (name, kind, spec_json, identity, status, created_ms, step, parent)
         VALUES ('tiny-1', 'pretrain', '{json}', 'identity', 'running', 1000, 7, 'base@best');
         INSERT INTO attempts (run, step, lane, worker, outcome) VALUES ('tiny-1', 7, 3, 'w1', 'lost');
         INSERT INTO steps VALUES ('tiny-1', 7, 2.5, 1.5, 0.001, 700, 100.0, 6);
         INSERT INTO events (run, time_ms, kind, text) VALUES ('tiny-1', 5, 'note', 'words');
         INSERT INTO events (run, time_ms, kind, text)
         VALUES ('tiny-1', 6, 'step', '{{\"event\":\"step\",\"step\":7,\"steps\":9,\"epoch\":0.5}}');"
    ))
    .unwrap();
    drop(old);
    let error = Store::open_read_only(&path).err().unwrap().to_string();
    assert!(error.contains("schema version 1"), "{error}");

    let store = Store::open(&path).unwrap();
    let run = name("tiny-1");
    let row = store.run(&run).unwrap();
    assert_eq!(row.spec, spec());
    assert_eq!((row.step, row.workers), (7, 0));
    assert_eq!(row.parent.as_deref(), Some("base@best"));
    assert_eq!(store.attempts(&run, 7).unwrap()[0].worker, "w1");
    let events = store.events(Some(&run), 0, 9).unwrap();
    assert_eq!(events[0].text, "words");
    let told: RunEvent = serde_json::from_str(&events[1].text).unwrap();
    assert!(
        matches!(&told, RunEvent::Step(s) if (s.step, s.steps, s.epoch, s.loss) == (7, 9, 0.5, 2.5)),
        "{told:?}"
    );
    assert_eq!(store.faults(&run, 9).unwrap(), []);
    store.set_workers(&run, 3).unwrap();
    drop(store);
    assert_eq!(Store::open(&path).unwrap().run(&run).unwrap().workers, 3);
}

#[test]
fn a_newer_database_is_refused() {
    let (dir, store) = store_with_run("tiny-1");
    let path = dir.path().join("cohort.db");
    store.execute_batch("PRAGMA user_version = 99").unwrap();
    drop(store);
    let before = fs::read(&path).unwrap();
    for opened in [Store::open(&path), Store::open_read_only(&path)] {
        let error = opened.err().unwrap().to_string();
        assert!(
            error.contains("schema version 99, this build of cohort knows up to 4"),
            "{error}"
        );
    }
    assert_eq!(fs::read(&path).unwrap(), before, "it is not touched");
}

#[test]
fn what_is_no_database_of_ours_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cohort.db");
    assert!(matches!(Store::open_read_only(&path), Err(StoreError::Missing(p)) if p == path));
    Connection::open(&path)
        .unwrap()
        .execute_batch("CREATE TABLE theirs (a)")
        .unwrap();
    assert!(matches!(Store::open(&path), Err(StoreError::Foreign(p)) if p == path));
    fs::write(
        &path,
        "random bytes, long enough to hold what should be a header of a database".repeat(9),
    )
    .unwrap();
    let error = Store::open(&path).err().unwrap();
    assert!(
        matches!(&error, StoreError::Corrupt { path: p, .. } if *p == path),
        "{error:?}"
    );
}

#[test]
fn what_lies_beside_a_database_that_was_moved_away_does_not_come_back() {
    let (dir, store) = store_with_run("tiny-1");
    let fresh = tempfile::tempdir().unwrap();
    let beside = dir.path().join("cohort.db-wal");
    assert!(fs::metadata(&beside).unwrap().len() > 0);
    fs::copy(&beside, fresh.path().join("cohort.db-wal")).unwrap();
    drop(store);
    let store = Store::open(&fresh.path().join("cohort.db")).unwrap();
    assert_eq!(store.runs().unwrap(), []);
}

#[test]
fn a_damaged_page_is_noticed_when_the_database_is_opened() {
    let (dir, store) = store_with_run("tiny-1");
    let path = dir.path().join("cohort.db");
    drop(store);
    let mut bytes = fs::read(&path).unwrap();
    for page in bytes.chunks_mut(4096).skip(1) {
        page[..64].fill(0xa5);
    }
    fs::write(&path, bytes).unwrap();
    let error = Store::open(&path).err().unwrap();
    assert!(
        matches!(&error, StoreError::Corrupt { path: p, .. } if *p == path),
        "{error:?}"
    );
}

/// Everything that a database consists of but rows, in one order.
fn shape(path: &Path) -> Vec<(String, String, Vec<String>)> {
    let database = Connection::open(path).unwrap();
    let mut objects = database
        .prepare("SELECT type, name FROM sqlite_schema WHERE name NOT LIKE 'sqlite_%' ORDER BY type, name")
        .unwrap();
    let objects: Vec<(String, String)> = objects
        .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))
        .unwrap()
        .map(Result::unwrap)
        .collect();
    let columns = |name: &str| {
        let mut columns = database
            .prepare("SELECT name || ' ' || type || ' ' || \"notnull\" || ' ' || pk FROM pragma_table_xinfo(?)")
            .unwrap();
        let rows = columns.query_map([name], |row| row.get(0)).unwrap();
        rows.map(Result::unwrap).collect()
    };
    objects
        .into_iter()
        .map(|(kind, name)| {
            let columns = columns(&name);
            (kind, name, columns)
        })
        .collect()
}

#[test]
fn a_database_of_each_version_becomes_what_a_new_one_is() {
    let dir = tempfile::tempdir().unwrap();
    let fresh = dir.path().join("fresh.db");
    drop(Store::open(&fresh).unwrap());
    for version in 1..=MIGRATIONS.len() {
        let path = dir.path().join(format!("{version}.db"));
        let scripts = MIGRATIONS[..version].concat();
        let spec = serde_json::to_string(&spec()).unwrap();
        Connection::open(&path)
            .unwrap()
            .execute_batch(&format!(
                "{scripts};
                 PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {version};
                 INSERT INTO runs (name, kind, spec_json, identity, status, created_ms, step)
                 VALUES ('tiny-1', 'pretrain', '{spec}', 'identity', 'running', 1000, 7);"
            ))
            .unwrap();
        let store = Store::open(&path).unwrap();
        assert_eq!(store.run(&name("tiny-1")).unwrap().step, 7, "{version}");
        drop(store);
        assert_eq!(shape(&path), shape(&fresh), "{version}");
    }
}

#[test]
fn an_upgrade_that_is_cut_short_is_made_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cohort.db");
    let fresh = dir.path().join("fresh.db");
    drop(Store::open(&fresh).unwrap());
    // What is left where the process died within the third script: the first two were committed, and no more.
    let old = Connection::open(&path).unwrap();
    old.execute_batch(&format!(
        "{VERSION_1}; {VERSION_2}; PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = 2; BEGIN; {VERSION_3};"
    ))
    .unwrap();
    drop(old);
    drop(Store::open(&path).unwrap());
    assert_eq!(shape(&path), shape(&fresh));
}
