//! Measures all rows on longer steps and writes the page.

use std::fmt::Write;
use std::time::Instant;

use super::{FULL, Measured, ROWS, processes};

const HEAD: &str = "\
# What faults cost

Every row is one run that is disturbed once it is warm. What it must end with is what the undisturbed run ends with: the
same state, the same steps and the same ledger. The rows are tests as well (`tests/faults.rs`), on smaller steps; random
schedules of such faults are in `tests/chaos.rs`.

This page is written by

```sh
COHORT_FAULTS_TABLE=docs/faults.md cargo test --test integration faults::table -- --nocapture
```

";

const COLUMNS: &str = "\
- **Time to detect**: from the fault to the event that says that a worker is lost, as a client sees it.
- **Delay of the step**: how much longer the step in flight took than the median step of the undisturbed run. Where a
  fault lasts, it is that of the longest step; where the run goes back to a checkpoint, it lasts until there is a step
  that had not been there.
- **Work redone**: lanes that others computed, steps that were taken again.
- **Samples lost or doubled**: by comparing the ledger, which says which samples went into each step.

";

const LIMITS: &str = "
## Limits

All processes share one machine and its cores, so a worker that is lost leaves the others more of them, and the network is
loopback behind a proxy in the test's process. Each row is one measurement, not a mean. A fault that is met between two
events of a worker is noticed no sooner than its silence is told from a long pause. SIGSTOP stands in for a machine that
hangs, a limit on the size of files for a full disk. Kernels that crash and disks that lose what they have flushed are
not among these faults.
";

/// Writes the page to the path in `COHORT_FAULTS_TABLE`, relative to the repository; does nothing without it.
#[test]
fn table() {
    let Some(path) = std::env::var_os("COHORT_FAULTS_TABLE") else {
        return;
    };
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    let mut page = HEAD.to_owned();
    page += &setting();
    page += COLUMNS;
    page += "| fault | time to detect | delay of the step | work redone | samples lost or doubled | bits equal | note |\n";
    page += "| --- | --- | --- | --- | --- | --- | --- |\n";
    let long: (&str, fn(&super::Bench) -> Measured) = (
        "SIGSTOP of a worker for 10 s",
        processes::stopped_for_ten_seconds,
    );
    let mut failed = Vec::new();
    for (fault, measure) in ROWS.iter().copied().chain([long]) {
        let begin = Instant::now();
        // A row that fails must not take the others with it.
        let measured = std::panic::catch_unwind(|| measure(&FULL));
        eprintln!(
            "{fault}: {:.1} s: {measured:?}",
            begin.elapsed().as_secs_f64()
        );
        match measured {
            Ok(measured) => page += &row(fault, &measured),
            Err(_) => failed.push(fault),
        }
    }
    page += LIMITS;
    std::fs::write(&path, page).expect("the page can be written");
    assert!(failed.is_empty(), "without these rows: {failed:?}");
}

/// On what it was measured.
fn setting() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info
        .lines()
        .find_map(|line| line.strip_prefix("model name"));
    let model = model.map_or("an unknown CPU", |line| {
        line.trim_start_matches([' ', '\t', ':'])
    });
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    format!(
        "Measured with three workers of one thread each, on {cores} cores ({model}). The model has {} layers of width {}; \
         a step has 6 lanes, and takes {} ms when nothing disturbs it. The build is that of the tests.\n\n",
        FULL.layers,
        FULL.width,
        FULL.reference().median.as_millis()
    )
}

fn row(fault: &str, measured: &Measured) -> String {
    let ms = |time: Option<u64>| {
        time.map_or("—".to_owned(), |ms| {
            format!("{:.2} s", ms as f64 / 1000.0)
        })
    };
    let (samples, bits) = match measured.bits_equal {
        true => ("0", "yes"),
        false => ("see the note", "**no**"),
    };
    let note = match measured.bits_equal {
        true => measured.note.clone(),
        false => format!("{} {}", measured.note, measured.differences.join("; ")),
    };
    let mut row = String::new();
    writeln!(
        row,
        "| {fault} | {} | {} | {} | {samples} | {bits} | {} |",
        ms(measured.detect_ms),
        ms(measured.delay_ms),
        measured.redone,
        note.trim().replace(['\n', '|'], " ")
    )
    .expect("a string can be written to");
    row
}
