//! Clusters of thousands: that they end as a faultless machine does, whoever comes and goes, and that a step costs the
//! coordinator so many messages and bytes for each worker, however many there are.

use super::world::{Work, World};
use super::{CALM_MS, check, number};
use crate::ids::Step;

/// A cluster that is never the same for two steps.
struct Churn {
    workers: usize,
    lanes: u32,
    steps: Step,
    /// Joins and losses, at least.
    changes: u64,
    /// Times that the coordinator is killed.
    crashes: u64,
}

impl Churn {
    /// Lets it happen, and compares the end with a faultless machine's. Gives the world.
    fn run(&self, seed: u64) -> World {
        let mut world = World::new(seed, self.lanes, self.steps);
        for _ in 0..self.workers {
            let w = world.add_worker();
            // The first has all lanes until the others have the state.
            world.workers[w].lane_ms = 1;
        }
        let (mut lost, mut crashed) = (0, 0);
        // Half of the changes are losses, and each is followed by a join. They happen in the first two thirds of the run.
        let losses = self.changes.div_ceil(2);
        let until = self.steps * 2 / 3;
        let mut next = 0;
        while world.end.is_none() && world.now < 40 * CALM_MS {
            let at = world.disk.ledger.len() as Step;
            if at > 0 && world.now >= next && lost < losses {
                // As many as are due by this step, and a few at a time.
                let due = (losses * (at + 1) / until).min(losses).saturating_sub(lost);
                let some = due.div_ceil(8);
                for _ in 0..some {
                    lost += u64::from(self.lose(&mut world));
                }
                next = world.now + 5;
            }
            if crashed < self.crashes && at > (crashed + 1) * self.steps / (self.crashes + 2) {
                world.crash_coordinator();
                crashed += 1;
            }
            world.step();
        }
        check(&world, self.lanes, self.steps);
        assert!(lost >= losses, "{lost} of {losses} were lost");
        assert_eq!(crashed, self.crashes);
        assert!(world.joined >= self.changes / 2, "{} joined", world.joined);
        world
    }

    /// A worker dies and comes back with nothing, or is cut off for longer than it is waited for, and comes back with what
    /// it has.
    fn lose(&self, world: &mut World) -> bool {
        let w = world.draw(self.workers as u64) as usize;
        let there = world.workers[w].alive && world.workers[w].cut_until <= world.now;
        if there && world.draw(8) == 0 {
            world.workers[w].cut_until = world.now + 10_000 + world.draw(2_000);
        } else if there {
            world.kill_worker(w, true);
        }
        there
    }
}

/// Workers of the large clusters, unless `COHORT_SIM_WORKERS` says another number.
const WORKERS: usize = 400;

#[test]
fn a_cluster_that_is_never_the_same_ends_as_a_faultless_machine_does() {
    let workers = number("COHORT_SIM_WORKERS").map_or(WORKERS, |workers| workers as usize);
    // As many lanes as workers, and far fewer.
    for (seed, lanes) in [(1, workers as u32), (2, 24)] {
        let churn = Churn {
            workers,
            lanes,
            steps: 30,
            changes: 10 * workers as u64,
            crashes: 2,
        };
        let began = clock();
        let world = churn.run(seed);
        let Work {
            events, messages, ..
        } = world.work;
        println!(
            "{workers} workers, {lanes} lanes: {} joins, {events} events and {messages} messages of the coordinators, {:.0} virtual s, in {:.0} s",
            world.joined,
            world.now as f64 / 1e3,
            began()
        );
    }
}

/// What a step costs, the mean of a few, when nothing happens.
fn step_of(workers: usize, lanes: u32) -> (f64, f64) {
    let mut world = World::new(3, lanes, 40);
    world.counts_bytes = true;
    for _ in 0..workers {
        let w = world.add_worker();
        world.workers[w].lane_ms = 5;
    }
    let until = |world: &mut World, step: usize| {
        while world.disk.ledger.len() < step {
            world.step();
        }
        world.work
    };
    // The last of them were there late, and validations and checkpoints are left out.
    let before = until(&mut world, 30);
    let after = until(&mut world, 34);
    let mean = |of: fn(&Work) -> u64| (of(&after) - of(&before)) as f64 / 4.0 / workers as f64;
    (mean(|work| work.messages), mean(|work| work.bytes))
}

#[test]
fn a_step_costs_so_many_messages_and_bytes_for_each_worker_however_many_there_are() {
    for lanes_each in [1, 3] {
        let steps: Vec<_> = [300, 600, 1_200]
            .map(|workers| step_of(workers, workers as u32 * lanes_each))
            .to_vec();
        for (messages, bytes) in &steps {
            // Compute, Commit, and what is hedged now and then.
            assert!((1.9..3.0).contains(messages), "{steps:?}");
            assert!((50.0..300.0).contains(bytes), "{steps:?}");
        }
    }
    // Workers without a lane cost a commit.
    let (messages, bytes) = step_of(600, 16);
    assert!((1.0..2.0).contains(&messages), "{messages}");
    assert!((40.0..700.0).contains(&bytes), "{bytes}");
}

/// Seconds since now. Clocks are for people here.
#[allow(clippy::disallowed_methods)]
fn clock() -> impl Fn() -> f64 {
    let began = std::time::Instant::now();
    move || began.elapsed().as_secs_f64()
}
