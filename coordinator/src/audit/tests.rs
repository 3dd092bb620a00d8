//! A run made by hand, and each way in which it can contradict itself.

use cohort_common::checkpoint::{CheckpointMeta, RunState, state_hash, write_checkpoint};
use cohort_common::hf::SpecialTokens;
use cohort_common::layout::Layout;
use cohort_common::order::Order;
use cohort_common::spec::{WatchdogAction, WatchdogConfig};
use rusqlite::{Connection, params};
use tempfile::TempDir;

use super::*;
use crate::store::tests::{name, spec, store_with_run};
use crate::store::{CheckpointRow, StepRow};

/// Samples in an epoch, and steps of the run: four epochs and 32 samples. The last two steps are past the warm-up.
const SAMPLES: u64 = 40;
const STEPS: u64 = 12;
/// The step of the checkpoint.
const KEPT: u64 = 4;

struct Scene {
    _dir: TempDir,
    store: Store,
    home: Home,
}

/// A run of twelve steps with a checkpoint of the fourth.
fn scene() -> Scene {
    let (dir, store) = store_with_run("tiny-1");
    let scene = Scene {
        home: Home::open(dir.path()).unwrap(),
        store,
        _dir: dir,
    };
    let mut chain = first_chain(&spec());
    for step in 1..=STEPS {
        let entry = entry(step, chain.head());
        scene.store.append_entry(&name("tiny-1"), &entry).unwrap();
        chain.push(&entry).unwrap();
    }
    scene.store.set_progress(&name("tiny-1"), STEPS).unwrap();
    scene.checkpoint(|_| {});
    scene
}

fn entry(step: u64, previous: [u8; 32]) -> Entry {
    let train = spec().train;
    let lanes: Vec<LaneSums> = (0..train.lanes)
        .map(|lane| LaneSums {
            loss: 0.1 * f64::from(lane + 1) + step as f64,
            weight: 128.0,
        })
        .collect();
    let tree = Tree::new(train.lanes);
    let sum = |of: fn(&LaneSums) -> f64| tree.sum(&lanes.iter().map(of).collect::<Vec<_>>());
    Entry {
        step,
        first_position: (step - 1) * train.samples_per_step(),
        samples: train.samples_per_step(),
        loss_sum: sum(|l| l.loss),
        weight: sum(|l| l.weight),
        lanes,
        grad_norm: 1.5,
        learning_rate: learning_rate(&train, step),
        root_hash: [step as u8; 32],
        state_hash_before: (step == KEPT + 1).then(state),
        skipped: false,
        previous,
    }
}

fn buffer() -> Vec<f32> {
    vec![0.5; Layout::of(&spec().model).len()]
}

fn state() -> [u8; 32] {
    state_hash(&buffer(), &buffer(), &buffer())
}

impl Scene {
    fn audit(&self) -> AuditReport {
        let order = Mixture::alone(Order::new(spec().train.seed, SAMPLES, 8));
        with_samples(&self.store, &self.home, &name("tiny-1"), false, Ok(order)).unwrap()
    }

    /// The first contradiction must say all of these.
    #[track_caller]
    fn contradicts(&self, words: &[&str]) {
        let report = self.audit();
        let text = report.contradiction.unwrap_or_default();
        let missing = words.iter().find(|word| !text.contains(**word));
        assert_eq!(missing, None, "{text}");
        assert!(report.contradictions >= 1);
    }

    fn sql(&self, sql: &str) {
        let connection = Connection::open(self.store.path()).unwrap();
        assert!(connection.execute(sql, []).unwrap() > 0, "{sql}");
    }

    /// Changes an entry, and its hash with it.
    fn forge(&self, step: u64, change: impl FnOnce(&mut Entry)) {
        let mut entry = self.store.entry(&name("tiny-1"), step).unwrap().unwrap();
        change(&mut entry);
        let connection = Connection::open(self.store.path()).unwrap();
        let sql = "UPDATE ledger SET entry = ?1, hash = ?2 WHERE step = ?3";
        let values = params![entry.encode(), entry.hash(), step as i64];
        assert_eq!(connection.execute(sql, values).unwrap(), 1);
    }

    /// Writes the checkpoint, changed.
    fn checkpoint(&self, change: impl FnOnce(&mut CheckpointMeta)) {
        let run = name("tiny-1");
        let entries = self.store.entries(&run, 1, KEPT as u32).unwrap();
        let lines: String = entries.iter().map(|e| e.to_json_line() + "\n").collect();
        let mut meta = CheckpointMeta {
            tokens: SpecialTokens {
                bos: None,
                eos: vec![0],
            },
            tokenizer: br#"{"added_tokens": [{"id": 0, "content": "<|end|>"}]}"#.to_vec(),
            chat_template: None,
            base: None,
            run: RunState {
                run: run.to_string(),
                spec: spec(),
                step: KEPT,
                samples: KEPT * 16,
                tokens: KEPT * 16 * 64,
                val_loss: None,
                ledger_head: entries.last().unwrap().hash(),
                state_hash: [0; 32],
            },
            ledger: lines.into_bytes(),
        };
        change(&mut meta);
        let target = self.home.checkpoint(&run, KEPT);
        let _ = std::fs::remove_dir_all(&target);
        write_checkpoint(&target, meta, &buffer(), &buffer(), &buffer()).unwrap();
        let manifest = cohort_common::checkpoint::verify_files(&target).unwrap();
        let row = CheckpointRow {
            step: KEPT,
            path: target.display().to_string(),
            bytes: manifest.bytes(),
            val_loss: None,
            state_hash: manifest.state_hash,
            time_ms: 1,
        };
        self.store.record_checkpoint(&run, &row).unwrap();
    }
}

#[test]
fn a_run_without_contradiction_is_counted() {
    let report = scene().audit();
    assert_eq!(report.contradiction, None);
    assert_eq!(report.notes, [] as [String; 0]);
    let counts = (report.entries, report.step, report.lanes, report.samples);
    assert_eq!(counts, (STEPS, STEPS, 8 * STEPS, 16 * STEPS));
    let epochs = (report.epoch_samples, report.epochs, report.partial_samples);
    assert_eq!(epochs, (SAMPLES, 4, 32));
    let kept = (
        report.checkpoints,
        report.checkpoint_ledgers,
        report.state_hashes,
    );
    assert_eq!(kept, (1, 1, 1));
    assert!(report.checkpoint_bytes > 0);
}

#[test]
fn a_step_that_is_missing() {
    let scene = scene();
    scene.sql("DELETE FROM ledger WHERE step = 3");
    scene.contradicts(&["no entry for step 3", "step 4", "backup"]);
    scene.sql("DELETE FROM ledger WHERE step > 3");
    scene.sql("DELETE FROM checkpoints");
    let report = scene.audit();
    assert_eq!(report.entries, 2);
    let text = report.contradiction.unwrap();
    assert!(
        text.contains("12 steps") && text.contains("step 2"),
        "{text}"
    );
}

#[test]
fn an_entry_whose_bytes_were_changed() {
    let scene = scene();
    scene.sql("UPDATE ledger SET hash = zeroblob(32) WHERE step = 2");
    scene.contradicts(&[
        "ledger entry of step 2 of run `tiny-1`",
        "its hash is another",
    ]);
    // The others were read all the same.
    assert_eq!(scene.audit().entries, STEPS - 1);
}

#[test]
fn an_entry_that_was_changed_with_its_hash() {
    let scene = scene();
    scene.forge(2, |entry| entry.grad_norm = 2.5);
    scene.contradicts(&[
        "step 3 follows an entry with hash",
        "the ledger was changed",
    ]);
    let last = self::scene();
    last.forge(STEPS, |entry| entry.grad_norm = 2.5);
    // Nothing that is left could know: the last entry is held by a checkpoint of its step only.
    assert_eq!(last.audit().contradiction, None);
    let kept = self::scene();
    kept.forge(KEPT, |entry| entry.grad_norm = 2.5);
    kept.sql("DELETE FROM ledger WHERE step > 4");
    kept.sql("UPDATE runs SET step = 4");
    kept.contradicts(&["ledger_head", "step 4", "hash"]);
}

#[test]
fn lanes_and_sums_that_do_not_fit() {
    let lanes = scene();
    lanes.forge(5, |entry| entry.lanes.truncate(7));
    lanes.contradicts(&["step 5 has 7 lanes", "the run has 8"]);
    let sums = scene();
    sums.forge(1, |entry| {
        entry.loss_sum = f64::from_bits(entry.loss_sum.to_bits() + 1)
    });
    sums.contradicts(&["step 1 has the loss_sum", "its lanes sum to", "bits"]);
    let rate = scene();
    rate.forge(STEPS, |entry| entry.learning_rate = 0.25);
    rate.contradicts(&["step 12", "learning_rate 0.25", "schedule"]);
}

/// The step of [`watched`] that is out of the ordinary.
const SPIKE: u64 = 25;

/// A run of thirty steps whose watchdog skips one of them.
fn watched() -> Scene {
    let (dir, store) = store_with_run("tiny-1");
    let run = name("tiny-1");
    let mut spec = spec();
    spec.watchdog = Some(WatchdogConfig {
        action: WatchdogAction::Skip,
        window: 20,
        ..WatchdogConfig::default()
    });
    store.set_spec(&run, &spec, "identity").unwrap();
    let mut chain = first_chain(&spec);
    store.hold().unwrap();
    for step in 1..=30 {
        let mut entry = entry(step, chain.head());
        entry.state_hash_before = None;
        if step == SPIKE {
            entry.grad_norm = f64::NAN;
            entry.skipped = true;
            entry = entry.canonical();
        }
        store.append_entry(&run, &entry).unwrap();
        chain.push(&entry).unwrap();
    }
    store.set_progress(&run, 30).unwrap();
    store.release().unwrap();
    Scene {
        home: Home::open(dir.path()).unwrap(),
        store,
        _dir: dir,
    }
}

#[test]
fn what_was_skipped_follows_from_the_steps_before() {
    let report = watched().audit();
    assert_eq!((report.contradiction, report.skipped), (None, 1));
    let made = watched();
    made.forge(SPIKE, |entry| entry.skipped = false);
    made.contradicts(&["step 25", "gradient norm is not finite", "it was made"]);
    let ordinary = watched();
    ordinary.forge(30, |entry| entry.skipped = true);
    ordinary.contradicts(&["step 30 was committed without its update", "no reason"]);
    // One that cannot be read leaves nothing to judge by.
    let unreadable = watched();
    unreadable.sql("UPDATE ledger SET hash = zeroblob(32) WHERE step = 2");
    unreadable.forge(30, |entry| entry.skipped = true);
    let report = unreadable.audit();
    assert_eq!(report.contradictions, 2, "{:?}", report.contradiction);
    // Where nobody looks, nothing is skipped.
    let alone = scene();
    alone.forge(STEPS, |entry| entry.skipped = true);
    alone.contradicts(&["step 12", "no reason"]);
}

#[test]
fn positions_that_do_not_follow() {
    let position = scene();
    position.forge(STEPS, |entry| entry.first_position += 16);
    position.contradicts(&["step 12 begins at sample position 192", "ends at 176"]);
    let samples = scene();
    samples.forge(STEPS, |entry| entry.samples = 1 << 60);
    samples.contradicts(&[
        "step 12 consumed 1152921504606846976 samples",
        "16 in a step",
    ]);
}

#[test]
fn an_earlier_horizon_is_known_by_the_metrics() {
    let scene = scene();
    let run = name("tiny-1");
    let mut longer = spec();
    longer.train.steps = 300;
    scene.store.set_spec(&run, &longer, "identity").unwrap();
    scene.contradicts(&["step 12", "learning_rate", "schedule"]);
    for step in 1..=STEPS {
        let row = StepRow {
            step,
            horizon: 200,
            loss: 1.0,
            grad_norm: 1.5,
            learning_rate: 0.1,
            tokens: 0,
            tokens_per_second: 1.0,
            epoch: 0.0,
            bits_per_byte: None,
            mfu: None,
            time_ms: 0,
            skipped: false,
        };
        scene.store.record_step(&run, &row).unwrap();
    }
    let report = scene.audit();
    assert_eq!((report.contradiction, report.earlier_horizon), (None, 1));
}

#[test]
fn a_checkpoint_of_another_ledger() {
    let head = scene();
    head.checkpoint(|meta| meta.run.ledger_head = [7; 32]);
    head.contradicts(&["step-00000004", "ledger_head `0707", "entry of step 4"]);
    let lines = scene();
    lines.checkpoint(|meta| {
        let text = String::from_utf8(meta.ledger.clone()).unwrap();
        meta.ledger = text
            .replacen("\"grad_norm\":1.5", "\"grad_norm\":1.25", 1)
            .into();
    });
    lines.contradicts(&["line 1 of", "ledger.jsonl", "grad_norm 1.25", "1.5"]);
    let short = scene();
    short.checkpoint(|meta| {
        let end = meta.ledger.iter().position(|b| *b == b'\n').unwrap();
        meta.ledger.truncate(end + 1);
    });
    short.contradicts(&["ledger.jsonl` has 1 entries", "step 4"]);
    let state = scene();
    state.sql("DELETE FROM ledger WHERE step > 5");
    state.sql("UPDATE runs SET step = 5");
    state.forge(5, |entry| entry.state_hash_before = Some([9; 32]));
    state.contradicts(&["step 5", "state_hash_before", "0909"]);
    let other = scene();
    other.checkpoint(|meta| meta.run.run = "tiny-2".into());
    other.contradicts(&["step 4 of run `tiny-2`"]);
}

#[test]
fn checkpoints_and_their_rows() {
    let row = scene();
    row.sql("UPDATE checkpoints SET bytes = 5");
    row.contradicts(&["bytes, but the database lists it with 5"]);
    let gone = scene();
    std::fs::remove_dir_all(gone.home.checkpoint(&name("tiny-1"), KEPT)).unwrap();
    gone.contradicts(&["lists a checkpoint of step 4", "no directory"]);
    let extra = scene();
    extra.sql("DELETE FROM checkpoints");
    let report = extra.audit();
    assert_eq!(report.contradiction, None);
    assert!(
        report.notes[0].contains("does not list"),
        "{:?}",
        report.notes
    );
    let damaged = scene();
    let weights = damaged
        .home
        .checkpoint(&name("tiny-1"), KEPT)
        .join("model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&weights, bytes).unwrap();
    damaged.contradicts(&["model.safetensors", "damaged"]);
}

#[test]
fn a_walk_ends_where_positions_do_not_follow() {
    let mut walk = Walk::new(Mixture::alone(Order::new(1, SAMPLES, 8)));
    walk.consume(1, 0, 50).unwrap();
    walk.consume(2, 10, 20).unwrap();
    walk.consume(3, 50, 20).unwrap();
    let mut report = AuditReport::default();
    walk.report(&[], &mut report);
    let counts = (report.samples, report.epochs, report.partial_samples);
    assert_eq!(counts, (50, 1, 10));
}
