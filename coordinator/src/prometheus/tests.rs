//! The page of a made-up cluster, checked by a reader that takes nothing but what the format and its conventions allow.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use cohort_common::api::{FaultTotal, StepEvent, SystemView, TimeSplit};

use super::*;
use crate::store::RunStatus;
use crate::store::tests::{name, store_with_run};
use crate::view;

/// Labels and value of each sample, in their order.
type Samples = Vec<(BTreeMap<String, String>, f64)>;

/// A page as a reader has it: type and samples by name.
type Families = BTreeMap<String, (String, Samples)>;

fn cluster() -> ClusterView {
    let worker = |name: &str, host: &str| WorkerView {
        name: name.into(),
        host: host.into(),
        device: "cpu".into(),
        threads: 4,
        lanes: 3,
        ..WorkerView::default()
    };
    ClusterView {
        version: "0.1.0".into(),
        started_ms: 1_700_000_000_250,
        workers: vec![
            WorkerView {
                tokens_per_second: Some(1234.5),
                times: Some(TimeSplit {
                    compute: 0.5,
                    exchange: 0.25,
                    wait: 0.25,
                    data: 0.0,
                }),
                straggler: Some("its lanes take longer".into()),
                rss_bytes: Some(1 << 30),
                mfu: Some(0.4),
                peak_flops: Some(1e11),
                cores: Some(3.9),
                sent_per_second: Some(1e6),
                received_per_second: Some(2e6),
                line_bytes_per_second: Some(12_000_000),
                line_rtt_ms: Some(0.25),
                ..worker("w1", "odd \"host\"\\\nname")
            },
            worker("w2", "plain"),
        ],
        queued: vec!["next".into()],
        system: SystemView {
            cpus: Some(8),
            load: Some(1.5),
            cores: Some(0.5),
            rss_bytes: Some(1 << 20),
            memory_available_bytes: Some(1 << 33),
            memory_bytes: Some(1 << 34),
            disk_free_bytes: Some(1 << 40),
            disk_bytes: Some(1 << 41),
            control: ControlView {
                messages_sent: 10,
                bytes_sent: 1000,
                messages_received: 20,
                bytes_received: 500,
            },
        },
        ..ClusterView::default()
    }
}

fn run() -> RunView {
    let (_dir, store) = store_with_run("tiny-1");
    let run = name("tiny-1");
    store.set_status(&run, RunStatus::Running, None, 1).unwrap();
    let mut view = view::run(&store, &run, |_| Default::default()).unwrap();
    view.facts.parameters = 1_000_000;
    view.facts.corpus = "books".into();
    view.eta_seconds = Some(90.0);
    view.info.queue_place = Some(1);
    view.info.last_step = Some(StepEvent {
        run: "tiny-1".into(),
        step: 7,
        steps: 200,
        loss: f64::NAN,
        grad_norm: f64::INFINITY,
        learning_rate: 3e-5,
        tokens: 12_345_678_901,
        tokens_per_second: 1e6,
        epoch: 0.5,
        bits_per_byte: Some(1.5),
        mfu: Some(0.25),
        skipped: false,
    });
    for (step, split) in [(0, "validation"), (0, "base_validation"), (5, "validation")] {
        view.info.evals.push(EvalEvent {
            run: "tiny-1".into(),
            step,
            split: split.into(),
            loss: 4.0 - step as f64,
            bits_per_byte: Some(2.0),
            tokens: 10,
            classes: cohort_common::api::Classes::of(&["a".into(), "b".into()], &[1, 1, 0, 2]),
        });
    }
    view.info
        .checkpoints
        .push(cohort_common::api::CheckpointInfo {
            step: 5,
            path: "there".into(),
            bytes: 100,
            val_loss: None,
            state_hash: String::new(),
        });
    let total = |kind: &str, count, delay_ms| FaultTotal {
        kind: kind.into(),
        count,
        delay_ms,
    };
    view.fault_totals = vec![total("redone", 3, 1250), total("skipped", 1, 0)];
    view
}

/// Reads a page; panics where a line breaks a rule of the format, or a name one of Prometheus' conventions.
fn parse(page: &str) -> Families {
    let mut families = Families::new();
    let mut current = String::new();
    let mut helped = String::new();
    assert!(page.is_empty() || page.ends_with('\n'));
    for line in page.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, text) = help.split_once(' ').expect("a help has a text");
            assert!(
                !text.trim().is_empty() && !families.contains_key(name),
                "{line}"
            );
            helped = name.to_owned();
        } else if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').expect("a type has a word");
            assert_eq!(name, helped, "help comes before the type");
            check_name(name, kind);
            families.insert(name.to_owned(), (kind.to_owned(), Vec::new()));
            current = name.to_owned();
        } else {
            let (name, labels, value) = sample(line);
            assert_eq!(name, current, "{line}: samples of a name stand together");
            let (_, samples) = families.get_mut(&name).expect("just inserted");
            assert!(
                samples.iter().all(|(known, _)| *known != labels),
                "twice: {line}"
            );
            samples.push((labels, value));
        }
    }
    families
}

fn check_name(name: &str, kind: &str) {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    assert!(
        name.starts_with("cohort_") && name.chars().all(allowed),
        "{name}"
    );
    assert!(["gauge", "counter"].contains(&kind), "{kind}");
    assert_eq!(
        kind == "counter",
        name.ends_with("_total"),
        "{name} is a {kind}"
    );
    for word in name.split('_') {
        let other = [
            "ms",
            "milliseconds",
            "minutes",
            "hours",
            "kb",
            "mb",
            "kilobytes",
            "percent",
        ];
        assert!(!other.contains(&word), "{name}: `{word}` is no base unit");
        assert!(
            !["gauge", "counter"].contains(&word),
            "{name} says its type"
        );
    }
}

/// Name, labels and value of a line.
fn sample(line: &str) -> (String, BTreeMap<String, String>, f64) {
    let name_end = line.find(['{', ' ']).expect("a value");
    let (name, mut rest) = line.split_at(name_end);
    let mut labels = BTreeMap::new();
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        loop {
            let (label, after) = rest.split_once("=\"").expect("a label has a text");
            let ok = |c: char| c.is_ascii_lowercase() || c == '_';
            assert!(!label.is_empty() && label.chars().all(ok), "{line}");
            let (text, after) = quoted(after);
            assert!(labels.insert(label.to_owned(), text).is_none(), "{line}");
            match after.strip_prefix(',') {
                Some(more) => rest = more,
                None => {
                    rest = after.strip_prefix('}').expect("labels end");
                    break;
                }
            }
        }
    }
    let value = rest.strip_prefix(' ').expect("one space before the value");
    let value = match value {
        "+Inf" => f64::INFINITY,
        "-Inf" => f64::NEG_INFINITY,
        "NaN" => f64::NAN,
        number => {
            assert!(number.ends_with(|c: char| c.is_ascii_digit()), "{line}");
            number.parse().expect("a number")
        }
    };
    (name.to_owned(), labels, value)
}

/// The text up to the closing quote, and what is behind it.
fn quoted(text: &str) -> (String, &str) {
    let mut out = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return (out, &text[at + 1..]),
            '\\' => match chars.next().expect("something is escaped").1 {
                'n' => out.push('\n'),
                c @ ('\\' | '"') => out.push(c),
                c => panic!("\\{c} is no escape"),
            },
            c => out.push(c),
        }
    }
    panic!("no closing quote in {text}");
}

fn value(families: &Families, name: &str, wanted: &[(&str, &str)]) -> Option<f64> {
    let (_, samples) = families.get(name)?;
    let fits = |labels: &BTreeMap<String, String>| {
        wanted
            .iter()
            .all(|(label, text)| labels.get(*label).map(String::as_str) == Some(text))
    };
    let mut found = samples.iter().filter(|(labels, _)| fits(labels));
    let value = found.next().map(|(_, value)| *value);
    assert!(
        found.next().is_none(),
        "{name} {wanted:?} is not one series"
    );
    value
}

#[test]
fn the_page_keeps_the_rules_and_says_what_is_known() {
    let page = text(&cluster(), &[run()]);
    let families = parse(&page);
    let one = |name: &str, labels: &[(&str, &str)]| value(&families, name, labels);
    assert_eq!(one("cohort_build_info", &[("version", "0.1.0")]), Some(1.0));
    assert_eq!(
        one("cohort_start_time_seconds", &[]),
        Some(1_700_000_000.25)
    );
    assert_eq!(
        one("cohort_worker_info", &[("host", "odd \"host\"\\\nname")]),
        Some(1.0)
    );
    assert_eq!(
        one("cohort_worker_straggler", &[("worker", "w1")]),
        Some(1.0)
    );
    assert_eq!(
        one("cohort_worker_straggler", &[("worker", "w2")]),
        Some(0.0)
    );
    let share = [("worker", "w1"), ("kind", "exchange")];
    assert_eq!(one("cohort_worker_time_ratio", &share), Some(0.25));
    assert_eq!(
        one("cohort_worker_tokens_per_second", &[("worker", "w2")]),
        None
    );
    let of_run = [("run", "tiny-1")];
    assert_eq!(
        one("cohort_run_tokens_total", &of_run),
        Some(12_345_678_901.0)
    );
    assert!(one("cohort_run_loss", &of_run).is_some_and(f64::is_nan));
    assert_eq!(one("cohort_run_grad_norm", &of_run), Some(f64::INFINITY));
    assert_eq!(one("cohort_run_learning_rate", &of_run), Some(3e-5));
    let validation = [("run", "tiny-1"), ("split", "validation")];
    assert_eq!(one("cohort_run_validation_loss", &validation), Some(-1.0));
    for (kind, count) in [("redone", 3.0), ("worker_lost", 0.0), ("skipped", 1.0)] {
        let labels = [("run", "tiny-1"), ("kind", kind)];
        assert_eq!(
            one("cohort_run_faults_total", &labels),
            Some(count),
            "{kind}"
        );
    }
    assert_eq!(
        one("cohort_run_fault_delay_seconds_total", &of_run),
        Some(1.25)
    );
    assert_eq!(page, text(&cluster(), &[run()]), "the order is fixed");
}

#[test]
fn nothing_is_said_of_what_is_not_there() {
    let families = parse(&text(&ClusterView::default(), &[]));
    assert_eq!(value(&families, "cohort_workers", &[]), Some(0.0));
    assert!(
        families
            .keys()
            .all(|name| !name.contains("_run_") && !name.contains("_worker_"))
    );
    assert!(!families.contains_key("cohort_system_load1"));
}

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

/// Words of a text that begin with `cohort_`.
fn names(text: &str) -> BTreeSet<String> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let words = text.split(|c: char| !is_name(c));
    words
        .filter(|word| word.starts_with("cohort_"))
        .map(str::to_owned)
        .collect()
}

#[test]
fn the_dashboard_asks_for_what_there_is() {
    let families = parse(&text(&cluster(), &[run()]));
    let json = fs::read_to_string(repository("deploy/grafana/cohort.json")).unwrap();
    let dashboard: serde_json::Value = serde_json::from_str(&json).unwrap();
    let mut queries = Vec::new();
    let panels = dashboard["panels"].as_array().expect("panels");
    let mut ids = BTreeSet::new();
    for panel in panels {
        assert!(
            ids.insert(panel["id"].as_u64().expect("an id")),
            "an id twice"
        );
        let targets = panel["targets"].as_array();
        for target in targets.into_iter().flatten() {
            assert_eq!(target["datasource"]["uid"], "${datasource}");
            queries.push(target["expr"].as_str().expect("a query").to_owned());
        }
    }
    for variable in dashboard["templating"]["list"]
        .as_array()
        .expect("variables")
    {
        if variable["type"] == "query" {
            queries.push(variable["definition"].as_str().expect("a query").to_owned());
        }
    }
    assert!(queries.len() > 10, "{queries:?}");
    let asked = names(&queries.join("\n"));
    for name in &asked {
        assert!(
            families.contains_key(name),
            "the dashboard asks for `{name}`, which is not exported"
        );
    }
}

#[test]
fn the_page_of_documentation_lists_what_there_is() {
    let families = parse(&text(&cluster(), &[run()]));
    let page = fs::read_to_string(repository("docs/metrics.md")).unwrap();
    let exported: BTreeSet<String> = families.into_keys().collect();
    let rows = page.lines().filter(|line| line.starts_with("| `cohort_"));
    let told = names(&rows.collect::<Vec<_>>().join("\n"));
    assert_eq!(told, exported);
}

/// Writes the page for `tests/prometheus.py`, where a file is asked for.
#[test]
fn the_page_can_be_checked_by_others() {
    if let Some(path) = std::env::var_os("COHORT_PROMETHEUS_PAGE") {
        fs::write(path, text(&cluster(), &[run()])).unwrap();
    }
}
