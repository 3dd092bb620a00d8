//! Processes that die, stop, crawl, come and go.

use std::path::Path;
use std::time::{Duration, Instant};

use super::{Bench, Measured, Span, TRAIN, WARM, WORKERS};
use crate::support::cluster::{Cluster, RUN};
use crate::support::proxy::{Deed, Direction};
use crate::support::random::Random;
use crate::support::signal::{self, Signal};

/// The worker that things happen to.
pub const VICTIM: usize = 1;
/// How long the bytes may take in whose midst something happens.
pub const BYTES: Duration = Duration::from_secs(30);

pub fn killed_while_computing(bench: &Bench) -> Measured {
    bench.disturbed(|cluster| {
        cluster.run_for(bench.moment());
        let at = Instant::now();
        cluster.workers[VICTIM].kill();
        Span::at(at)
    })
}

pub fn killed_while_sending(bench: &Bench) -> Measured {
    bench.disturbed(|cluster| killed_in_mid_transfer(bench, cluster, Direction::Up))
}

pub fn killed_while_receiving(bench: &Bench) -> Measured {
    bench.disturbed(|cluster| killed_in_mid_transfer(bench, cluster, Direction::Down))
}

fn killed_in_mid_transfer(bench: &Bench, cluster: &mut Cluster<'_>, way: Direction) -> Span {
    let worker = &mut cluster.workers[VICTIM];
    let pid = worker.pid();
    let kill = Deed::Call(Box::new(move || signal::send(pid, Signal::Kill)));
    worker.proxy.at(way, bench.half, kill);
    let at = worker.proxy.wait_for_deed(BYTES);
    worker.bury();
    Span::at(at)
}

fn stopped(bench: &Bench, time: Option<Duration>) -> Measured {
    bench.disturbed(|cluster| {
        let at = Instant::now();
        cluster.workers[VICTIM].signal(Signal::Stop);
        match time {
            Some(time) => bench.hold(cluster, time),
            None => cluster.finish(),
        }
        let span = Span::since(at);
        cluster.workers[VICTIM].signal(Signal::Continue);
        span
    })
}

pub fn stopped_for_a_second(bench: &Bench) -> Measured {
    stopped(bench, Some(Duration::from_secs(1)))
}

/// For the table only.
pub fn stopped_for_ten_seconds(bench: &Bench) -> Measured {
    stopped(bench, Some(Duration::from_secs(10)))
}

pub fn stopped_for_ever(bench: &Bench) -> Measured {
    stopped(bench, None)
}

pub fn all_killed_but_one(bench: &Bench) -> Measured {
    bench.disturbed(|cluster| {
        let at = Instant::now();
        for worker in &mut cluster.workers[1..] {
            worker.kill();
        }
        Span::at(at)
    })
}

pub fn all_killed(bench: &Bench) -> Measured {
    let measured = bench.disturbed(|cluster| {
        let at = Instant::now();
        for worker in &mut cluster.workers {
            worker.kill();
        }
        for _ in 0..WORKERS {
            cluster.add_worker();
        }
        Span::at(at)
    });
    measured.noted("back to the newest checkpoint; the new processes' start is part of the delay")
}

pub fn joined(bench: &Bench) -> Measured {
    bench.disturbed(|cluster| {
        let at = Instant::now();
        let index = cluster.add_worker();
        cluster.workers[index].wait_until_joined();
        Span::rest(at)
    })
}

pub fn left(bench: &Bench) -> Measured {
    bench.disturbed(|cluster| {
        let at = Instant::now();
        cluster.workers[VICTIM].leave();
        Span::since(at)
    })
}

pub fn ten_came_and_went(bench: &Bench) -> Measured {
    let mut random = Random::new(10);
    bench.disturbed(|cluster| {
        let at = Instant::now();
        for turn in 0..10 {
            let alive = cluster.alive();
            let joins = match alive.len() {
                1 => true,
                4 => false,
                _ => random.pick(&[true, false]),
            };
            if joins {
                cluster.add_worker();
            } else {
                cluster.workers[random.pick(&alive)].leave();
            }
            cluster.wait_for_step(WARM + 2 * (turn + 1));
        }
        Span::rest(at)
    })
}

pub fn coordinator_killed_idle(bench: &Bench) -> Measured {
    let scene = bench.scene();
    let mut cluster = Cluster::start(&scene, 0);
    cluster.submit(&format!("{TRAIN} --new"));
    cluster.wait_until("a run that waits", |c| {
        c.events.iter().any(|e| e.is("waiting"))
    });
    cluster.kill_coordinator();
    cluster.restart_coordinator();
    for _ in 0..WORKERS {
        cluster.add_worker();
    }
    cluster.finish();
    let measured = bench.measure(&cluster, Span::at(Instant::now()));
    Measured {
        delay_ms: None,
        ..measured
    }
}

pub fn coordinator_killed_aggregating(bench: &Bench) -> Measured {
    bench.disturbed(|cluster| {
        let pid = cluster.coordinator_pid();
        let kill = Deed::Call(Box::new(move || signal::send(pid, Signal::Kill)));
        let proxy = &cluster.workers[VICTIM].proxy;
        proxy.at(Direction::Up, bench.half, kill);
        let at = proxy.wait_for_deed(BYTES);
        cluster.kill_coordinator();
        cluster.restart_coordinator();
        Span::at(at)
    })
}

pub fn coordinator_killed_committing(bench: &Bench) -> Measured {
    let mut random = Random::new(3);
    bench.disturbed(|cluster| {
        let at = Instant::now();
        for turn in 0..3 {
            cluster.wait_for_step(WARM + 8 * turn);
            // A commit is written, sent and applied in the milliseconds around its event.
            cluster.run_for(Duration::from_micros(random.within(0, 5_000)));
            cluster.kill_coordinator();
            cluster.restart_coordinator();
        }
        Span::since(at)
    })
}

pub fn coordinator_killed_writing(bench: &Bench) -> Measured {
    let mut caught = false;
    let measured = bench.disturbed(|cluster| {
        let checkpoints = cluster.scene.path(&format!("home/runs/{RUN}/checkpoints"));
        while !caught && !cluster.rests() {
            caught = is_written_to(&checkpoints);
            if !caught {
                cluster.run_for(Duration::from_micros(200));
            }
        }
        let at = Instant::now();
        cluster.kill_coordinator();
        let left = is_written_to(&checkpoints);
        cluster.restart_coordinator();
        caught &= left;
        Span::at(at)
    });
    assert!(caught, "no checkpoint was met while it was written");
    measured
}

/// Whether a checkpoint is under its temporary name.
fn is_written_to(checkpoints: &Path) -> bool {
    let entries = std::fs::read_dir(checkpoints)
        .into_iter()
        .flatten()
        .flatten();
    let mut names = entries.map(|entry| entry.file_name());
    names.any(|name| name.to_string_lossy().starts_with(".unfinished-"))
}

pub fn everything_killed(bench: &Bench) -> Measured {
    bench.disturbed(|cluster| {
        let at = Instant::now();
        cluster.kill_coordinator();
        for worker in &mut cluster.workers {
            worker.kill();
        }
        cluster.restart_coordinator();
        for _ in 0..2 {
            cluster.add_worker();
        }
        cluster.submit(TRAIN);
        Span::at(at)
    })
}

pub fn slow(bench: &Bench) -> Measured {
    let (mut steps, mut seconds) = (0, 0.0);
    let measured = bench.disturbed(|cluster| {
        let at = Instant::now();
        let first = cluster.step();
        let last = bench.steps * 3 / 4;
        while at.elapsed() < Duration::from_secs(6) && cluster.step() < last && !cluster.rests() {
            cluster.workers[VICTIM].signal(Signal::Stop);
            cluster.run_for(Duration::from_millis(45));
            cluster.workers[VICTIM].signal(Signal::Continue);
            cluster.run_for(Duration::from_millis(5));
        }
        steps = cluster.step() - first;
        seconds = at.elapsed().as_secs_f64();
        Span::since(at)
    });
    measured.noted(format!(
        "{steps} steps in {seconds:.1} s; an undisturbed run takes {} ms for each",
        bench.reference().median.as_millis()
    ))
}
