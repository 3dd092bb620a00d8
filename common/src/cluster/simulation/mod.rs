//! A whole cluster in one thread and in virtual time: the real machines of coordinator and workers, and the real
//! aggregation, over a network that loses, copies, delays and swaps messages, with processes that crash, freeze, are cut
//! off and come back, and with clocks that disagree. Gradients are small integers, so a lane that is lost or counted
//! twice shows in the sum, and each schedule's ledger must equal that of a run without a fault, entry by entry.
//!
//! `COHORT_SIM_SEEDS=N` sets the number of schedules, `COHORT_SIM_SEED=S` runs one. A failure prints its seed.

mod network;
mod scale;
mod sharing;
mod trainer;
mod workers;
mod world;

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use self::trainer::State;
use self::world::{Harm, World};
use super::events::{Action, Change, Event, Happening, LeftReason, MemberInfo};
use super::messages::{Found, FromWorker, Scores, StateSource};
use super::{EvalSplit, EvalWork, Limits, Machine, Prompt, RunPlan};
use crate::floats::add;
use crate::ids::{RunId, SessionId, Step};
use crate::ledger::{Chain, Entry, genesis, state_hash_due};
use crate::spec::{
    Architecture, CheckpointConfig, ModelConfig, Payload, RunKind, RunSpec, ScheduleKind,
    TrainConfig, WatchdogAction, WatchdogConfig,
};

/// The run's name.
const RUN: &str = "sim-1";

/// Schedules in a usual run of the tests, of each kind.
const SEEDS: u64 = 5_000;

/// One in so many schedules has a large cluster.
const LARGE_EVERY: u64 = 250;

pub(super) fn plan(lanes: u32, steps: Step) -> RunPlan {
    let train = TrainConfig {
        steps,
        lanes,
        micro_batch: 1,
        accumulate: 1,
        learning_rate: 1.0,
        min_learning_rate: 1.0,
        warmup_steps: 0,
        schedule: ScheduleKind::Constant,
        decay_steps: 0,
        beta1: 0.9,
        beta2: 0.9,
        eps: 1e-8,
        weight_decay: 0.0,
        grad_clip: 0.0,
        precision: Default::default(),
        payload: Payload::F32,
        diloco: None,
        gradient_checkpointing: false,
        seed: 0,
        eval_every: 7,
        eval_samples: 0,
        freeze_layers: None,
        layer_decay: None,
        unfreeze_every: None,
        data_share: None,
        replay: None,
        // Losses grow in this world, so that the third validation ends a run that has this.
        early_stopping_patience: is_patient(steps).then_some(2),
        max_forgetting: None,
        max_length: None,
        min_workers: 1,
    };
    let model = ModelConfig {
        architecture: Architecture::Llama,
        vocab_size: 8,
        context: 4,
        hidden_size: 8,
        num_hidden_layers: 1,
        num_attention_heads: 1,
        num_key_value_heads: 1,
        intermediate_size: 8,
        tie_word_embeddings: true,
        bias: false,
        dropout: 0.0,
        norm_eps: 1e-5,
        head_dim: None,
        attention_bias: false,
        qk_norm: false,
        rope_theta: 1e4,
        rope_scaling: None,
        initializer_range: 0.02,
        labels: Vec::new(),
    };
    RunPlan {
        run: RunId::new(RUN),
        spec: Arc::new(RunSpec {
            kind: RunKind::Pretrain,
            model,
            train,
            checkpoint: CheckpointConfig { every: 9, keep: 2 },
            corpus: "corpus".into(),
            mixture: None,
            start: None,
            lora: None,
            samples: None,
            watchdog: watchdog(steps),
        }),
        splits: splits(steps).into(),
        source: StateSource::Seed,
        chain: Chain::new(1, 0, genesis(b"simulated")),
        recent: Vec::new(),
        expected: 0,
        retain: 3 + (steps % 4),
        chunks: trainer::LEN as u32,
        losses: super::Losses::default(),
        history: super::History::default(),
        shipped: None,
    }
}

/// What validations score, and in one run of two what is written at each so-manieth.
fn splits(steps: Step) -> Vec<EvalSplit> {
    let scored = EvalSplit {
        label: "validation".into(),
        units: 5,
        every: 1,
        work: EvalWork::Score {
            corpus: "corpus".into(),
            split: "validation".into(),
            windows: 1,
        },
    };
    let prompt = |prompt| Prompt {
        tokens: vec![prompt],
        most: 4,
    };
    let written = writes_every(steps).map(|every| EvalSplit {
        label: "samples".into(),
        units: PROMPTS,
        every,
        work: EvalWork::Write {
            prompts: (0..PROMPTS).map(prompt).collect(),
            ends: vec![0],
        },
    });
    std::iter::once(scored).chain(written).collect()
}

/// Prompts of a run that has some.
const PROMPTS: u32 = 3;

/// Validations from which to which a run writes; `None` where it has no prompts.
fn writes_every(steps: Step) -> Option<u64> {
    (steps % 2 == 1).then_some(1 + steps % 3)
}

/// Whether a run ends where validations get no better.
fn is_patient(steps: Step) -> bool {
    steps % 5 == 3
}

/// Some runs have steps out of the ordinary, and somebody who looks.
fn watchdog(steps: Step) -> Option<WatchdogConfig> {
    let action = match steps % 4 {
        1 => WatchdogAction::Skip,
        2 => WatchdogAction::Pause,
        _ => return None,
    };
    let window = 20;
    Some(WatchdogConfig {
        sigma: 6.0,
        window,
        action,
    })
}

/// The step at which a run ends.
fn last(steps: Step) -> Step {
    match is_patient(steps) {
        true => steps.min(14),
        false => steps,
    }
}

/// The state after each step and the ledger that a single faultless machine finds.
fn expected(lanes: u32, steps: Step) -> (BTreeMap<Step, State>, BTreeMap<Step, Entry>) {
    let spec = plan(lanes, steps).spec;
    let mut history = super::History::default();
    let mut state = State::seed(spec.skips());
    let mut states = BTreeMap::from([(0, state.clone())]);
    let mut ledger = BTreeMap::new();
    let mut previous = genesis(b"simulated");
    for step in 1..=last(steps) {
        let mut root = vec![0.0; trainer::LEN];
        for lane in 0..lanes {
            add(&mut root, &state.gradient(lane));
        }
        let totals = trainer::totals(&root);
        let found: Vec<_> = (0..lanes).map(|l| state.sums(l)).collect();
        let weight = f64::from(lanes) * 4.0;
        let mut entry = Entry {
            step,
            first_position: (step - 1) * u64::from(lanes),
            samples: u64::from(lanes),
            loss_sum: found.iter().map(|l| l.loss).sum(),
            lanes: found,
            weight,
            grad_norm: totals.sum_of_squares.sqrt() / weight,
            learning_rate: 1.0,
            root_hash: totals.hash,
            state_hash_before: state_hash_due(step).then(|| state.hash()),
            skipped: false,
            previous,
        }
        .canonical();
        entry.skipped = spec
            .watched()
            .is_some_and(|w| history.judge(w, &entry).is_some());
        history.push(&entry);
        match entry.skipped {
            true => state.pass_over(),
            false => state.update(&root),
        }
        previous = entry.hash();
        ledger.insert(step, entry);
        states.insert(step, state.clone());
    }
    (states, ledger)
}

/// What the user must find when all is over, whatever happened.
fn check(world: &World, lanes: u32, steps: Step) {
    let every = writes_every(steps);
    let (states, ledger) = expected(lanes, steps);
    let steps = last(steps);
    let finished = matches!(world.end, Some(Change::Finished { step, .. }) if step == steps);
    assert!(finished, "{:?} {}", world.end, world.describe());
    for (step, entry) in &ledger {
        let found = world.disk.ledger.get(step);
        let difference = found.map(|e| e.difference(entry));
        assert_eq!(difference, Some(None), "step {step}");
    }
    assert_eq!(world.disk.ledger.len(), ledger.len());
    assert_eq!(world.disk.checkpoints[&steps], states[&steps]);
    let scored: Vec<Step> = world.evals.keys().copied().collect();
    let mut due: Vec<Step> = (0..=steps).filter(|s| s.is_multiple_of(7)).collect();
    if due.last() != Some(&steps) {
        due.push(steps);
    }
    assert_eq!(scored, due);
    let turn = |step: &Step| every.is_some_and(|every| (step / 7).is_multiple_of(every));
    let writes = |step: &&Step| every.is_some() && (turn(step) || **step == steps);
    let written = due.iter().filter(writes).map(|step| {
        let all = (0..PROMPTS).map(|prompt| states[step].writes(prompt));
        (*step, all.collect())
    });
    assert_eq!(world.written, written.collect());
}

/// Virtual time after which no more faults happen.
const CALM_MS: u64 = 25_000;

/// Virtual time after which a run that has not ended hangs.
const HUNG_MS: u64 = 600_000;

/// One random fault, or none.
fn disturb(world: &mut World) {
    let count = world.workers.len() as u64;
    let w = world.draw(count) as usize;
    match world.draw(12) {
        0 | 1 => {
            let comes_back = world.draw(3) > 0;
            world.kill_worker(w, comes_back);
        }
        2 => world.workers[w].frozen_until = world.now + 1 + world.draw(1_500),
        3 => world.workers[w].frozen_until = world.now + 1 + world.draw(8_000),
        4 => world.workers[w].cut_until = world.now + 1 + world.draw(8_000),
        5 if count < 8 => {
            world.add_worker();
        }
        6 if count > 2 => world.ask_to_leave(w),
        7 if world.draw(3) == 0 => world.crash_coordinator(),
        8 if world.draw(8) == 0 => {
            for w in 0..world.workers.len() {
                world.kill_worker(w, true);
            }
        }
        9 => world.workers[w].lane_ms = 1 + world.draw(120),
        10 => world.request_checkpoint(),
        _ => {}
    }
}

fn run_schedule(seed: u64, divides: bool) {
    let large = seed % LARGE_EVERY == LARGE_EVERY - 1;
    let (lanes, steps, workers) = match large {
        true => (64 + (seed % 37) as u32, 8, 100 + seed / LARGE_EVERY % 200),
        false => (1 + (seed % 13) as u32, 20 + seed % 30, 1 + seed % 5),
    };
    let mut world = World::new(seed, lanes, steps);
    world.divides = divides;
    for _ in 0..workers {
        world.add_worker();
    }
    if seed.is_multiple_of(4) {
        world.harm = Harm {
            lost: 2,
            copied: 20,
            swapped: 2,
        };
    }
    world.harmed_uploads = seed.is_multiple_of(3);
    world.failover = seed % 5 == 1;
    let faulty = seed % 16 != 15;
    let mut next = 0;
    while world.end.is_none() && world.now < HUNG_MS {
        if faulty && world.now >= next && world.now < CALM_MS {
            disturb(&mut world);
            next = world.now + world.draw(if large { 100 } else { 400 });
        }
        if world.now >= CALM_MS {
            world.harm = Harm::default();
            // Whoever is left must be able to finish.
            if !world.workers.iter().any(|w| w.alive) {
                world.add_worker();
            }
        }
        world.step();
    }
    check(&world, lanes, steps);
}

/// A number in the environment.
fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn any_schedule_of_faults_leaves_the_same_ledger_and_the_same_state() {
    run_schedules(false);
}

#[test]
fn so_does_any_schedule_where_moments_are_divided() {
    run_schedules(true);
}

fn run_schedules(divides: bool) {
    let seeds = match number("COHORT_SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("COHORT_SIM_SEEDS").unwrap_or(SEEDS),
    };
    let total = seeds.end - seeds.start;
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get()) as u64;
    let failed = std::thread::scope(|scope| {
        let part = |t: u64| {
            let mine = seeds.clone().filter(move |s| s % threads == t);
            scope.spawn(move || {
                for seed in mine {
                    let run = AssertUnwindSafe(|| run_schedule(seed, divides));
                    if std::panic::catch_unwind(run).is_err() {
                        eprintln!("seed {seed} failed");
                        return Some(seed);
                    }
                }
                None
            })
        };
        let running: Vec<_> = (0..threads).map(part).collect();
        let ends = running.into_iter().map(|t| t.join().expect("caught"));
        ends.flatten().min()
    });
    if let Some(seed) = failed {
        panic!("one of {total} schedules failed: COHORT_SIM_SEED={seed} repeats it");
    }
}

/// A cluster of so many workers without any fault, up to a moment.
fn calm(seed: u64, workers: u64, until: u64) -> World {
    let mut world = World::new(seed, 8, 40);
    for _ in 0..workers {
        let w = world.add_worker();
        world.workers[w].lane_ms = 5;
    }
    while world.now < until {
        world.step();
    }
    world
}

fn finish(world: &mut World) {
    while world.end.is_none() && world.now < HUNG_MS {
        world.step();
    }
    check(world, 8, 40);
}

/// Lets the memory of a worker change in mid-run. Either a lane that two workers computed gives it away, and the run stops
/// and names them, or the hash of its state does. Gives the world where the hash did.
fn corrupted(seed: u64, workers: usize) -> Option<World> {
    let mut world = World::new(seed, 8, 40);
    for _ in 0..workers {
        let w = world.add_worker();
        world.workers[w].lane_ms = 5;
    }
    world.corrupt = Some((workers - 1, 25));
    while world.end.is_none() && world.now < HUNG_MS {
        world.step();
    }
    if let Some(Change::Failed { error }) = &world.end {
        assert!(error.contains("disagree"), "{error}");
        return None;
    }
    check(&world, 8, 40);
    assert_eq!(world.withdrawn, 1, "seed {seed}");
    Some(world)
}

#[test]
fn a_worker_whose_memory_changes_is_named_and_what_it_touched_is_made_again() {
    let worlds: Vec<World> = (0..40).filter_map(|seed| corrupted(seed, 3)).collect();
    assert!(worlds.len() > 10, "{}", worlds.len());
    for world in worlds {
        let deviated = |h: &&Happening| {
            let reason = match h {
                Happening::Lost { reason, .. } => reason,
                _ => return false,
            };
            matches!(reason, LeftReason::Deviated { .. })
        };
        assert_eq!(world.happened.iter().filter(deviated).count(), 1);
    }
}

#[test]
fn two_workers_that_disagree_both_start_again() {
    let worlds = (0..40).filter_map(|seed| corrupted(seed, 2));
    assert!(worlds.count() > 10);
}

#[test]
fn a_joiner_holds_nobody_up_and_a_slow_worker_hardly() {
    let mut world = calm(5, 2, 150);
    let w = world.add_worker();
    world.workers[w].lane_ms = 5;
    finish(&mut world);
    let joined = |h: &Happening| matches!(h, Happening::Joined { .. });
    // The second of the first two came later than the first, too.
    assert_eq!(world.happened.iter().filter(|h| joined(h)).count(), 2);
    let quick = world.now;
    let mut world = calm(5, 3, 100);
    world.workers[0].lane_ms = 200;
    finish(&mut world);
    assert!(world.now < 6 * quick, "{} against {quick}", world.now);
}

#[test]
fn a_coordinator_that_comes_back_goes_on_where_the_workers_are() {
    for seed in 0..50 {
        let mut world = calm(seed, 3, 150);
        world.crash_coordinator();
        finish(&mut world);
        let saved: Vec<Step> = world.disk.checkpoints.keys().copied().collect();
        assert!(saved.contains(&40), "seed {seed}");
    }
}

/// Runs a calm cluster of three to the end of a run of so many steps.
fn undisturbed(steps: Step) -> World {
    let mut world = World::new(7, 8, steps);
    for _ in 0..3 {
        let w = world.add_worker();
        world.workers[w].lane_ms = 5;
    }
    while world.end.is_none() && world.now < HUNG_MS {
        world.step();
    }
    check(&world, 8, steps);
    world
}

#[test]
fn workers_that_reach_each_other_sum_the_gradient_themselves() {
    let mut world = calm(4, 3, 0);
    finish(&mut world);
    assert!(world.shared.len() > 30, "{:?}", world.shared);
    assert!(world.collected.is_empty(), "{:?}", world.collected);
    // Here one is killed, frozen, cut off or slow in mid-run: that step is the coordinator's.
    for fault in 0..4 {
        let mut world = calm(4, 3, 0);
        while world.disk.ledger.len() < 15 {
            world.step();
        }
        let now = world.now;
        match fault {
            0 => world.kill_worker(1, false),
            1 => world.workers[1].frozen_until = now + 1_900,
            2 => world.workers[1].cut_until = now + 1_900,
            _ => world.workers[1].lane_ms = 300,
        }
        finish(&mut world);
        let collected: Vec<Step> = world.collected.iter().copied().collect();
        let expected = if fault == 3 { 0..=0 } else { 1..=1 };
        assert!(
            expected.contains(&collected.len()),
            "fault {fault}: {collected:?} of {:?}",
            world.shared
        );
    }
}

#[test]
fn sites_add_up_first_whether_they_were_told_or_measured() {
    // The workers of the first seed are told which of two sites they are of; those of the second are on two hosts, and the way
    // between these is measured.
    for seed in [13, 4] {
        let gathered = |fault: Option<usize>| {
            let mut world = World::new(seed, 8, 60);
            for _ in 0..3 {
                let w = world.add_worker();
                world.workers[w].lane_ms = 5;
            }
            while world.disk.ledger.len() < 15 {
                world.step();
            }
            let now = world.now;
            match fault {
                Some(0) => world.kill_worker(0, false),
                Some(1) => world.workers[1].frozen_until = now + 1_900,
                Some(2) => world.workers[2].cut_until = now + 1_900,
                // It is hedged, by one of another site.
                Some(3) => world.workers[1].lane_ms = 300,
                _ => {}
            }
            while world.end.is_none() && world.now < HUNG_MS {
                world.step();
            }
            check(&world, 8, 60);
            (world.gathered.len(), world.collected.len())
        };
        let (steps, collected) = gathered(None);
        assert!(steps > 40, "seed {seed}: {steps}");
        assert_eq!(collected, 0, "seed {seed}");
        for fault in 0..4 {
            let (steps, collected) = gathered(Some(fault));
            assert!(steps >= 10, "seed {seed}, fault {fault}: {steps}");
            assert!(collected <= 1, "seed {seed}, fault {fault}: {collected}");
        }
    }
}

/// A calm cluster of three that divide the moments, up to the step before this one.
fn divided(seed: u64, steps: usize) -> World {
    let mut world = World::new(seed, 8, 40);
    world.divides = true;
    for _ in 0..3 {
        let w = world.add_worker();
        world.workers[w].lane_ms = 5;
    }
    while world.disk.ledger.len() < steps {
        world.step();
    }
    world
}

#[test]
fn workers_that_divide_the_moments_come_to_the_same_end() {
    let mut world = divided(4, 0);
    finish(&mut world);
    assert!(world.divided.len() > 30, "{:?}", world.divided);
    assert!(world.collected.is_empty(), "{:?}", world.collected);
    // Nobody listens here: all is whole.
    let mut world = divided(3, 0);
    finish(&mut world);
    assert!(world.divided.is_empty(), "{:?}", world.divided);
}

#[test]
fn nothing_is_made_again_whenever_one_who_keeps_moments_is_lost() {
    // From within one step to within the next one but one, checkpoint included.
    let mut events = 0;
    let mut world = divided(4, 7);
    while world.disk.ledger.len() < 10 {
        world.step();
        events += 1;
    }
    for fault in 0..3 {
        for after in (0..events).step_by(2) {
            let mut world = divided(4, 7);
            for _ in 0..after {
                world.step();
            }
            let w = after % 3;
            match fault {
                0 => world.kill_worker(w, false),
                1 => world.kill_worker(w, true),
                _ => world.cut_off(w, 6_000),
            }
            finish(&mut world);
            assert_eq!(world.again, 0, "fault {fault} after {after}");
        }
    }
}

#[test]
fn a_coordinator_that_comes_back_finds_the_moments_where_they_were() {
    for seed in (0..60).filter(|seed| seed % 3 != 0 && seed % 5 != 0) {
        let mut world = divided(seed, 12);
        world.crash_coordinator();
        finish(&mut world);
        assert!(
            world.divided.len() > 20,
            "seed {seed}: {:?} {:?}\n{}",
            world.divided,
            world.notes,
            world.describe()
        );
    }
}

#[test]
fn a_joiner_gets_its_part_of_the_moments() {
    let mut world = divided(4, 12);
    let w = world.add_worker();
    world.workers[w].lane_ms = 5;
    world.ask_to_leave(0);
    finish(&mut world);
    assert_eq!(world.again, 0);
    assert!(world.divided.len() > 25, "{:?}", world.divided);
}

#[test]
fn a_watchdog_skips_the_steps_that_are_out_of_the_ordinary_and_no_others() {
    let world = undisturbed(45);
    let skipped = world.disk.ledger.values().filter(|e| e.skipped);
    let skipped: Vec<Step> = skipped.map(|e| e.step).collect();
    assert_eq!(skipped, [3, 12, 21, 25, 30, 34, 39, 43]);
    assert_eq!((world.unusual.len(), world.pauses.len()), (8, 0));
    let state = &world.disk.checkpoints[&45];
    assert_eq!((state.step, state.updates), (45, 37));
}

#[test]
fn a_watchdog_that_pauses_does_so_at_each_of_them_and_each_resumption_goes_on() {
    let world = undisturbed(46);
    assert_eq!(world.pauses, [3, 12, 21, 25, 30, 34, 39, 43]);
    assert!(
        world
            .pauses
            .iter()
            .all(|s| world.disk.checkpoints.contains_key(s))
    );
}

#[test]
fn a_checkpoint_is_written_at_the_next_boundary_after_it_was_asked_for() {
    let mut world = calm(3, 2, 0);
    let at = |world: &World| world.disk.ledger.len() as Step;
    while at(&world) < 12 {
        world.step();
    }
    world.request_checkpoint();
    finish(&mut world);
    let saved: Vec<Step> = world.disk.checkpoints.keys().copied().collect();
    assert_eq!(saved[..2], [9, 14], "step 14 was in flight");
}

#[test]
fn a_worker_of_other_numerics_is_refused() {
    let mut machine = Machine::new(Limits::default());
    let info = |fingerprint: &str| MemberInfo {
        host: "a".into(),
        pid: 1,
        device: "cpu".into(),
        threads: 1,
        fingerprint: fingerprint.into(),
        listens: None,
        site: None,
    };
    let join = |n: u64, fingerprint: &str| Event::Joined {
        session: SessionId(n),
        info: info(fingerprint),
        holding: None,
    };
    assert_eq!(machine.handle(0, join(1, "avx2")), []);
    let actions = machine.handle(0, join(2, "avx512"));
    assert!(
        matches!(
            &actions[..],
            [Action::Close {
                reason: LeftReason::Fingerprint { .. },
                ..
            }]
        ),
        "{actions:?}"
    );
    assert_eq!(machine.members().len(), 1);
}

#[test]
fn a_worker_that_answers_a_prompt_with_a_loss_is_sent_away_and_the_others_write() {
    let mut machine = Machine::new(Limits::default());
    let sessions = [SessionId(1), SessionId(2)];
    for session in sessions {
        let info = MemberInfo {
            host: "a".into(),
            pid: 1,
            device: "cpu".into(),
            threads: 1,
            fingerprint: "avx2".into(),
            listens: None,
            site: None,
        };
        let holding = None;
        machine.handle(
            0,
            Event::Joined {
                session,
                info,
                holding,
            },
        );
    }
    let plan = plan(2, 21);
    let (run, units) = (plan.run.clone(), [5, PROMPTS]);
    machine.handle(0, Event::Submitted(plan));
    let say = |session, message| Event::Said { session, message };
    for session in sessions {
        let loaded = FromWorker::Loaded {
            run: run.clone(),
            step: 0,
            state_hash: Some([1; 32]),
        };
        machine.handle(0, say(session, loaded));
    }
    let done = |split, unit, found| FromWorker::UnitDone {
        run: run.clone(),
        step: 0,
        split,
        unit,
        found,
    };
    for unit in 0..units[0] {
        let found = Found::Scores(Scores::default());
        machine.handle(0, say(sessions[0], done(0, unit, found)));
    }
    let wrong = done(1, 2, Found::Scores(Scores::default()));
    let actions = machine.handle(0, say(sessions[1], wrong));
    let sent_away = actions.iter().any(|action| {
        matches!(action, Action::Close { session, reason: LeftReason::Protocol(_) } if *session == sessions[1])
    });
    assert!(sent_away, "{actions:?}");
    let mut actions = Vec::new();
    for unit in 0..units[1] {
        let found = Found::Written(vec![unit]);
        actions.extend(machine.handle(0, say(sessions[0], done(1, unit, found))));
    }
    let sampled = Action::Sampled {
        run: run.clone(),
        step: 0,
        written: vec![vec![0], vec![1], vec![2]],
    };
    assert!(actions.contains(&sampled), "{actions:?}");
}

#[test]
fn the_only_one_with_the_state_is_waited_for_though_others_are_there_without_it() {
    for seed in 0..30 {
        let mut world = calm(seed, 1, 900);
        let w = world.add_worker();
        while world.workers[w].session.is_none() {
            world.step();
        }
        world.down(0);
        finish(&mut world);
        assert_eq!(world.again, 0, "seed {seed}");
    }
}

#[test]
fn a_worker_that_was_slow_once_gets_lanes_again() {
    let (lanes, steps) = (8, 332);
    let mut world = World::new(3, lanes, steps);
    for lane_ms in [5, 120] {
        let w = world.add_worker();
        world.workers[w].lane_ms = lane_ms;
    }
    let idle = |world: &World| {
        let with = world.assigned.iter().filter(|(_, lanes)| !lanes.is_empty());
        with.count() == 1
    };
    while !idle(&world) {
        world.step();
    }
    world.workers[1].lane_ms = 5;
    while world.end.is_none() && world.now < HUNG_MS {
        world.step();
    }
    assert!(!idle(&world), "{:?}", world.assigned);
    check(&world, lanes, steps);
}

#[test]
fn a_coordinator_on_another_machine_goes_on_with_what_the_workers_bring() {
    let mut brought = 0;
    for seed in 0..40 {
        let mut world = World::new(seed, 8, 40);
        world.failover = true;
        for _ in 0..3 {
            let w = world.add_worker();
            world.workers[w].lane_ms = 5;
        }
        while world.now < 900 {
            world.step();
        }
        let before = world.disk.ledger.keys().last().copied().unwrap_or(0);
        world.crash_coordinator();
        let after = world.disk.ledger.keys().last().copied().unwrap_or(0);
        brought += u32::from(after + 1 < before);
        finish(&mut world);
    }
    assert!(brought > 5, "{brought}");
}
