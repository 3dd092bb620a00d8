//! A cluster and a run as news, and what the state makes of news and keys.

use cohort_common::api::{
    Band, CheckpointInfo, ClusterView, EvalEvent, History, RunFacts, RunInfo, RunView, SampleInfo,
    StepEvent, TimeSplit, TimelineEntry, WorkerView,
};
use cohort_common::spec::{CorpusFacts, Preset, SpecSource};
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use super::keys::Intent;
use super::state::{Action, Axis, Link, News, Over, Panel, State};

/// The moment of all pictures.
const NOW_MS: u64 = 1_700_000_600_000;

/// A committed step of a run that learns.
pub fn step(run: &str, step: u64) -> StepEvent {
    StepEvent {
        run: run.into(),
        step,
        steps: 2000,
        loss: loss(step),
        grad_norm: 0.8,
        learning_rate: 3e-4,
        tokens: 512 * step,
        tokens_per_second: 33_300.0,
        epoch: step as f64 / 600.0,
        bits_per_byte: Some(loss(step) * 0.5),
        mfu: Some(0.41),
        skipped: false,
    }
}

fn loss(step: u64) -> f64 {
    1.5 + 6.0 * (-(step as f64) / 150.0).exp()
}

/// A history of `count` points up to a step.
pub fn history(run: &str, last: u64, count: u64) -> History {
    let steps: Vec<u64> = (1..=count).map(|i| i * last / count).collect();
    let band = |of: &dyn Fn(u64) -> f64, spread: f32| {
        let mean: Vec<Option<f32>> = steps.iter().map(|s| Some(of(*s) as f32)).collect();
        let around = |by: f32| mean.iter().map(|m| m.map(|m| m + by)).collect();
        Band {
            min: around(-spread),
            max: around(spread),
            mean,
        }
    };
    History {
        run: run.into(),
        rows: last,
        tokens: steps.iter().map(|step| 512 * step).collect(),
        time_ms: steps
            .iter()
            .map(|step| NOW_MS - 400_000 + 500 * step)
            .collect(),
        loss: band(&loss, 0.3),
        grad_norm: band(&|step| 0.8 + (step as f64 / 40.0).sin() / 2.0, 0.0),
        learning_rate: band(&|step| 3e-4 * (1.0 - step as f64 / 2000.0), 0.0),
        tokens_per_second: band(&|step| if step % 7 == 0 { 20_000.0 } else { 33_000.0 }, 0.0),
        mfu: Band {
            mean: vec![None; steps.len()],
            ..Band::default()
        },
        step: steps,
    }
}

fn eval(run: &str, step: u64, split: &str) -> EvalEvent {
    EvalEvent {
        run: run.into(),
        step,
        split: split.into(),
        loss: loss(step) + 0.1,
        bits_per_byte: Some(1.3),
        tokens: 4096,
        classes: None,
    }
}

/// A run that stands at a step.
pub fn run(name: &str, status: &str, at: u64) -> RunView {
    let toml = Preset::find("tiny").expect("it is there").toml;
    let source = SpecSource::parse("tiny.toml", toml).expect("it is a spec");
    let meant = source.into_file().and_then(|file| file.validate());
    let facts = CorpusFacts {
        fingerprint: "c0ffee".into(),
        vocab_size: 300,
        labels: Vec::new(),
    };
    let spec = meant.and_then(|meant| meant.run_spec(facts, None));
    let checkpoint = |step: u64| CheckpointInfo {
        step,
        path: format!("/home/runs/{name}/{step}"),
        bytes: 12_300_000,
        val_loss: Some(loss(step) + 0.1),
        state_hash: "00ff".into(),
    };
    RunView {
        info: RunInfo {
            name: name.into(),
            status: status.into(),
            step: at,
            spec: spec.expect("a spec of a run"),
            parent: None,
            error: None,
            created_ms: NOW_MS - 500_000,
            finished_ms: None,
            queue_place: None,
            last_step: (at > 0).then(|| step(name, at)),
            evals: (0..=at / 200)
                .map(|i| eval(name, 200 * i, "validation"))
                .collect(),
            checkpoints: (1..=at / 200).map(|i| checkpoint(200 * i)).collect(),
            faults: Vec::new(),
            workers: 2,
            samples: Vec::new(),
            stored: None,
        },
        facts: RunFacts {
            parameters: 1_234_567,
            corpus: "books".into(),
            ..RunFacts::default()
        },
        timeline: timeline(),
        samples: Vec::new(),
        fault_totals: Vec::new(),
        eta_seconds: (status == "running").then_some(62.0),
    }
}

fn timeline() -> Vec<TimelineEntry> {
    let entry = |id: u64, ago_s: u64, kind: &str, text: &str, cost_ms| TimelineEntry {
        id,
        time_ms: NOW_MS - 1000 * ago_s,
        step: None,
        kind: kind.into(),
        text: text.into(),
        worker: None,
        cost_ms,
    };
    vec![
        entry(1, 480, "training", "trains on 3 workers", None),
        entry(
            2,
            95,
            "worker_lost",
            "worker w3 lost at step 612 (connection closed)",
            None,
        ),
        entry(
            3,
            94,
            "redone",
            "step 612: lanes 4,5 of w3 redone by w1,w2",
            Some(310),
        ),
        entry(4, 12, "checkpoint", "checkpoint of step 600, 12.3 MB", None),
    ]
}

/// Two workers, one of which is late.
pub fn cluster() -> ClusterView {
    let worker = |name: &str, compute: f64, straggler: Option<&str>| WorkerView {
        name: name.into(),
        host: "box".into(),
        device: "cpu".into(),
        threads: 4,
        lanes: 3,
        tokens_per_second: Some(16_100.0),
        times: Some(TimeSplit {
            compute,
            exchange: 0.125,
            wait: 0.75 - compute,
            data: 0.125,
        }),
        straggler: straggler.map(str::to_owned),
        mfu: Some(0.4),
        ..WorkerView::default()
    };
    ClusterView {
        now_ms: NOW_MS,
        workers: vec![
            worker("w1", 0.5, None),
            worker("w2", 0.75, Some("2.1 times slower")),
        ],
        active: Some("tiny-1".into()),
        ..ClusterView::default()
    }
}

/// A dashboard that has seen a run.
pub fn state(status: &str, at: u64) -> State {
    let mut state = State::new(None, Link::Live, NOW_MS);
    state.take(News::Cluster(Box::new(cluster())));
    state.take(News::Runs(vec![
        run("old-1", "finished", 2000).info,
        run("tiny-1", status, at).info,
    ]));
    state.take(News::Run(Box::new(run("tiny-1", status, at))));
    state.take(News::History(Box::new(history("tiny-1", at, 160.min(at)))));
    state
}

/// A key without others.
pub fn press(state: &mut State, code: KeyCode) -> Option<Intent> {
    state.press(KeyEvent::new(code, KeyModifiers::NONE))
}

fn letter(state: &mut State, letter: char) -> Option<Intent> {
    press(state, KeyCode::Char(letter))
}

#[test]
fn only_what_differs_is_a_change() {
    let mut state = state("running", 700);
    assert!(state.take_changed());
    state.take(News::Run(Box::new(run("tiny-1", "running", 700))));
    state.take(News::Cluster(Box::new(cluster())));
    state.take(News::Step(step("tiny-1", 650)));
    state.take(News::Step(step("other-1", 800)));
    assert!(!state.has_changed(), "nothing of that is new");
    state.take(News::Step(step("tiny-1", 701)));
    assert!(state.take_changed());
    assert_eq!(state.newest.as_ref().map(|step| step.step), Some(701));
    // Steps that were taken back are gone from the view as well.
    state.take(News::Run(Box::new(run("tiny-1", "running", 600))));
    assert_eq!(state.newest.as_ref().map(|step| step.step), Some(600));
}

#[test]
fn nothing_is_done_to_a_run_without_a_yes() {
    let mut state = state("running", 700);
    assert_eq!(letter(&mut state, 'p'), None);
    assert_eq!(state.over, Over::Question(Action::Pause));
    assert_eq!(letter(&mut state, 'x'), None);
    assert_eq!(state.over, Over::Question(Action::Pause), "no answer");
    assert_eq!(letter(&mut state, 'n'), None);
    assert_eq!(state.over, Over::Nothing);
    letter(&mut state, 'c');
    let done = letter(&mut state, 'y');
    assert_eq!(done, Some(Intent::Act(Action::Cancel, "tiny-1".into())));
    letter(&mut state, 'u');
    assert_eq!(state.over, Over::Nothing);
    assert_eq!(
        state.notice.as_deref(),
        Some("tiny-1 is running; there is nothing to resume")
    );
    state.take(News::Link(Link::Lost("gone".into())));
    letter(&mut state, 'p');
    assert_eq!(state.over, Over::Nothing);
    assert_eq!(
        state.notice.as_deref(),
        Some("the coordinator does not answer")
    );
}

#[test]
fn the_list_and_the_arrows_choose_another_run() {
    let mut state = state("running", 700);
    press(&mut state, KeyCode::Right);
    assert!(state.shows("tiny-1"), "there is none beyond");
    letter(&mut state, 'r');
    assert_eq!(state.over, Over::Runs(0));
    assert!(state.look.runs);
    press(&mut state, KeyCode::Down);
    press(&mut state, KeyCode::Down);
    assert_eq!(state.over, Over::Runs(1), "there are two");
    press(&mut state, KeyCode::Enter);
    assert!(state.shows("old-1") && !state.look.runs);
    assert_eq!(state.run, None);
    // What was on its way for the run before is not shown.
    state.take(News::Run(Box::new(run("tiny-1", "running", 701))));
    state.take(News::History(Box::new(history("tiny-1", 701, 100))));
    assert_eq!((state.run.as_ref(), state.history.step.len()), (None, 0));
    state.take(News::Run(Box::new(run("old-1", "finished", 2000))));
    press(&mut state, KeyCode::Right);
    assert!(state.shows("tiny-1"));
}

#[test]
fn keys_change_what_is_seen_within_bounds() {
    let mut state = state("running", 700);
    for expected in [Axis::Tokens, Axis::Time, Axis::Step] {
        letter(&mut state, 'x');
        assert_eq!(state.axis, expected);
    }
    letter(&mut state, '-');
    assert_eq!(state.look.zoom, 0);
    (0..100).for_each(|_| drop(letter(&mut state, '+')));
    assert_eq!(state.look.zoom, 20);
    letter(&mut state, '0');
    assert_eq!(state.look.zoom, 0);
    for expected in [
        Panel::Workers,
        Panel::Events,
        Panel::Checkpoints,
        Panel::Charts,
    ] {
        press(&mut state, KeyCode::Tab);
        assert_eq!(state.panel, expected);
    }
    press(&mut state, KeyCode::BackTab);
    (0..100).for_each(|_| drop(press(&mut state, KeyCode::Down)));
    assert_eq!(state.scrolled(Panel::Checkpoints), 2, "there are three");
    assert_eq!(letter(&mut state, 's'), None);
    assert_eq!(state.over, Over::Nothing, "there are no samples");
    assert_eq!(letter(&mut state, 'q'), Some(Intent::Quit));
    let control_c = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
    assert_eq!(state.press(control_c), Some(Intent::Quit));
}

#[test]
fn a_lost_coordinator_is_told_until_one_answers() {
    let mut state = state("running", 700);
    state.take(News::Link(Link::Lost("connection refused".into())));
    assert_eq!(state.cluster, None);
    state.take(News::Link(Link::Live));
    assert_eq!(state.notice.as_deref(), Some("a coordinator answers now"));
    (0..12).for_each(|_| state.take(News::Cluster(Box::new(cluster()))));
    assert_eq!(state.notice, None, "it goes away by itself");
}

/// Samples of two prompts.
pub fn samples(run: &str) -> Vec<SampleInfo> {
    let sample = |step, index, text: &str| SampleInfo {
        run: run.into(),
        step,
        index,
        prompt: "Once upon".into(),
        text: text.into(),
    };
    vec![
        sample(200, 0, " the the"),
        sample(600, 0, " a time\nthere was"),
        sample(600, 1, " a hill"),
    ]
}
