//! What the workers' figures mean: how fast each one is, how its time goes, and whom the others wait for. The newest ten
//! seconds are kept for whoever looks, and about every ten seconds a row goes to the database. Time is an argument here.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use cohort_common::api::{TimeSplit, WorkerView};
use cohort_common::cluster::events::MemberInfo;
use cohort_common::figures::{Counters, Figures};
use cohort_common::ids::{RunId, SessionId, Step};

use crate::driver::now_ms;
use crate::store::WorkerTimesRow;

/// How far back the present reaches.
const WINDOW: Duration = Duration::from_secs(10);

/// A worker that has said nothing for so long has no present.
const STALE: Duration = Duration::from_secs(5);

/// Time between two rows of a worker in the database: at least so long, and so long for each worker that there is.
const ROWS: (Duration, Duration) = (Duration::from_secs(10), Duration::from_millis(100));

/// The others wait for a straggler for this share of their time, or more.
const WAITING: f64 = 0.15;

/// The lanes of a straggler take so many times as long as those of the others, or more.
const SLOWER: f64 = 1.25;

/// How a worker's time went in a run, to be written down.
#[derive(Debug, PartialEq)]
pub struct TimesDue {
    /// The run.
    pub run: RunId,
    /// The row.
    pub row: WorkerTimesRow,
}

/// All workers' figures.
#[derive(Debug, Default)]
pub struct Book(BTreeMap<SessionId, Worker>);

#[derive(Debug)]
struct Worker {
    name: String,
    host: String,
    device: String,
    peak_flops: Option<f64>,
    /// The newest figures, oldest first, all of the same run.
    window: VecDeque<(Instant, Figures)>,
    times: Option<Times>,
}

/// What is written down of a worker in a run.
#[derive(Debug)]
struct Times {
    run: RunId,
    /// The counters of the newest row, or those at the beginning.
    since: Counters,
    /// The step of the newest row, and the counters before it.
    row: Option<(Step, Counters)>,
    written: Instant,
}

impl Book {
    /// A worker has joined.
    pub fn joined(
        &mut self,
        session: SessionId,
        info: &MemberInfo,
        peak_flops: Option<f64>,
        now: Instant,
    ) {
        let worker = Worker {
            name: session.to_string(),
            host: info.host.clone(),
            device: info.device.clone(),
            peak_flops,
            window: VecDeque::from([(now, Figures::default())]),
            times: None,
        };
        self.0.insert(session, worker);
    }

    /// A worker said what it did. Gives what is to be written down.
    pub fn heard(&mut self, session: SessionId, said: Figures, now: Instant) -> Option<TimesDue> {
        let every = ROWS.0.max(ROWS.1 * self.0.len() as u32);
        self.0.get_mut(&session)?.heard(said, now, every)
    }

    /// A session has ended. Gives what is to be written down.
    pub fn left(&mut self, session: SessionId, now: Instant) -> Option<TimesDue> {
        self.0.remove(&session)?.row(now)
    }

    /// A run rests. Gives what is to be written down; what its workers say later of it still counts.
    pub fn rests(&mut self, run: &RunId, now: Instant) -> Vec<TimesDue> {
        let of_run = |w: &&mut Worker| w.times.as_ref().is_some_and(|t| t.run == *run);
        let workers = self.0.values_mut().filter(of_run);
        workers.filter_map(|worker| worker.row(now)).collect()
    }

    /// What the processors of some workers can do together; `None` where one of them has not measured.
    pub fn peak_of(&self, sessions: impl IntoIterator<Item = SessionId>) -> Option<f64> {
        let peaks = sessions
            .into_iter()
            .map(|session| self.0.get(&session)?.peak_flops);
        peaks.sum::<Option<f64>>().filter(|sum| *sum > 0.0)
    }

    /// Adds to a worker's view what is known of its present. `flops_per_token` is the active run's.
    pub fn show(
        &self,
        session: SessionId,
        view: &mut WorkerView,
        flops_per_token: Option<f64>,
        now: Instant,
    ) {
        let Some(worker) = self.0.get(&session) else {
            return;
        };
        view.peak_flops = worker.peak_flops;
        let Some((seconds, did)) = worker.present(now) else {
            return;
        };
        let newest = &worker.window[worker.window.len() - 1].1;
        let share = |micros: u64| micros as f64 / 1e6 / seconds;
        let rate = |count: u64| count as f64 / seconds;
        view.tokens_per_second = (newest.counters.tokens > 0).then(|| rate(did.tokens));
        view.times = Some(TimeSplit {
            compute: share(did.compute_us),
            exchange: share(did.exchange_us),
            wait: share(did.wait_us),
            data: share(did.data_us),
        });
        view.mfu = view.tokens_per_second.and_then(|speed| {
            let done = speed * flops_per_token?;
            Some(done / worker.peak_flops?)
        });
        view.rss_bytes = newest.usage.map(|usage| usage.rss_bytes);
        view.cores = worker.cpu_micros().map(share);
        view.sent_per_second = Some(rate(did.sent_bytes)).filter(|rate| *rate > 0.0);
        view.received_per_second = Some(rate(did.received_bytes)).filter(|rate| *rate > 0.0);
    }

    /// The worker that the others wait for, and why; `None` where the work is balanced.
    pub fn straggler(&self, now: Instant) -> Option<(SessionId, String)> {
        let paces = self.0.iter().filter_map(|(s, w)| Some((*s, w.pace(now)?)));
        let paces: Vec<(SessionId, Pace)> = paces.collect();
        let slowest = paces
            .iter()
            .max_by(|a, b| a.1.busy_per_step.total_cmp(&b.1.busy_per_step))?;
        let others = || {
            paces
                .iter()
                .filter(|(s, _)| *s != slowest.0)
                .map(|(_, p)| p)
        };
        let count = others().count();
        let mean = |of: fn(&Pace) -> f64| others().map(of).sum::<f64>() / count as f64;
        let (session, pace) = slowest;
        let waiting = mean(|p| p.idle);
        let ratio = pace.lane_time / mean(|p| p.lane_time);
        let held_up = count > 0 && waiting >= WAITING && pace.idle < waiting / 2.0;
        if !held_up || ratio < SLOWER {
            return None;
        }
        let why = match pace.text > 0.3 {
            true => format!(
                "its lanes take {ratio:.1} times as long as those of the others: it waits for text for {:.0} % of its time",
                100.0 * pace.text
            ),
            false => format!("its lanes take {ratio:.1} times as long as those of the others"),
        };
        Some((*session, why))
    }
}

/// How a worker keeps up with the others.
#[derive(Clone, Copy, Debug)]
struct Pace {
    /// Seconds that it is busy in a step.
    busy_per_step: f64,
    /// Seconds that a lane takes.
    lane_time: f64,
    /// Share of its time in which it computes nothing and waits for no text.
    idle: f64,
    /// Share of its time in which it waits for text.
    text: f64,
}

impl Worker {
    fn heard(&mut self, said: Figures, now: Instant, every: Duration) -> Option<TimesDue> {
        let run = said.run.as_ref().map(|(run, _)| run.clone());
        let same = self.times.as_ref().map(|times| &times.run) == run.as_ref();
        if !same {
            let due = self.row(now);
            self.times = run.map(|run| Times {
                run,
                since: said.counters,
                row: None,
                written: now,
            });
            self.window.clear();
            self.window.push_back((now, said));
            return due;
        }
        self.window.push_back((now, said));
        // One that is older stays, so that the window is full.
        while self
            .window
            .get(1)
            .is_some_and(|(at, _)| now - *at >= WINDOW)
        {
            self.window.pop_front();
        }
        let written = self.times.as_ref()?.written;
        (now.saturating_duration_since(written) >= every)
            .then(|| self.row(now))
            .flatten()
    }

    /// What has not been written down yet, as a row. A second row of a step takes the place of the first, so it tells of
    /// both.
    fn row(&mut self, now: Instant) -> Option<TimesDue> {
        let times = self.times.as_mut()?;
        let newest = &self.window.back()?.1;
        let (_, step) = newest.run.as_ref()?;
        let before = match times.row {
            Some((written, before)) if written == *step => before,
            _ => times.since,
        };
        if newest.counters == times.since {
            return None;
        }
        let did = newest.counters.since(&before);
        times.row = Some((*step, before));
        times.since = newest.counters;
        times.written = now;
        Some(TimesDue {
            run: times.run.clone(),
            row: WorkerTimesRow {
                worker: self.name.clone(),
                step: *step,
                time_ms: now_ms(),
                host: self.host.clone(),
                device: self.device.clone(),
                tokens: did.tokens,
                compute_us: did.compute_us,
                exchange_us: did.exchange_us,
                wait_us: did.wait_us,
                data_us: did.data_us,
            },
        })
    }

    /// The seconds of the present, and what was done in them.
    fn present(&self, now: Instant) -> Option<(f64, Counters)> {
        let (first, last) = (self.window.front()?, self.window.back()?);
        if now.saturating_duration_since(last.0) > STALE {
            return None;
        }
        let did = last.1.counters.since(&first.1.counters);
        let seconds = did.wall_us() as f64 / 1e6;
        (seconds > 0.0).then_some((seconds, did))
    }

    /// Processor time that the process has had in the present.
    fn cpu_micros(&self) -> Option<u64> {
        // The figures at the moment of joining were not said.
        let told = || self.window.iter().filter_map(|(_, figures)| figures.usage);
        let (first, last) = (told().next()?, told().next_back()?);
        let all = self.window.front()?.1.usage.is_some();
        all.then(|| last.cpu_us.saturating_sub(first.cpu_us))
    }

    fn pace(&self, now: Instant) -> Option<Pace> {
        let (seconds, did) = self.present(now)?;
        if did.steps == 0 || did.lanes == 0 {
            return None;
        }
        let of = |micros: u64| micros as f64 / 1e6;
        Some(Pace {
            busy_per_step: of(did.compute_us + did.data_us) / did.steps as f64,
            lane_time: of(did.lanes_us) / did.lanes as f64,
            idle: of(did.exchange_us + did.wait_us) / seconds,
            text: of(did.data_us) / seconds,
        })
    }
}

#[cfg(test)]
mod tests;
