//! What the trainer does while a node is computed: it says what lanes have found, pushes what is complete, and takes the digests
//! of a root that stays here.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use cohort_common::aggregate::RootDigests;
use cohort_common::cluster::messages::LaneSums;
use cohort_common::cluster::worker::Report;
use cohort_common::ids::{Lane, Step};
use cohort_common::tree::Node;

use super::{Computed, Reports, Signals};
use crate::engine::Gradient;
use crate::exchange::ExchangeClient;
use crate::lanes::{Hooks, Stop};

/// What becomes known of a root that stays here while it is computed.
#[derive(Default)]
pub(super) struct Staying {
    /// What its lanes have found, if they were computed in one pass: it is said with the root.
    pub found: Option<Report>,
    /// Of what is complete.
    pub digests: RootDigests,
}

/// What the trainer does while a node is computed.
pub(super) struct Listener<'a> {
    pub load: u64,
    pub step: Step,
    pub out: &'a Reports,
    pub signals: &'a Signals,
    pub computed: &'a mut Computed,
    pub exchange: &'a ExchangeClient,
    /// The node that is computed.
    pub node: Node,
    /// Whether others read the nodes.
    pub lends: bool,
    /// Where the node is the root of this worker alone: what becomes known of it.
    pub staying: Option<&'a mut Staying>,
    /// Whether nodes are rounded when they are complete.
    pub rounds: bool,
    /// Tokens of a lane.
    pub tokens: u64,
}

impl Hooks for Listener<'_> {
    fn go_on(&self) -> Result<(), Stop> {
        if self.signals.cancelled.load(Ordering::Acquire) {
            return Err(Stop::Cancelled);
        }
        match self.signals.committed.load(Ordering::Acquire) >= self.step {
            true => Err(Stop::Obsolete),
            false => Ok(()),
        }
    }

    fn skips(&self, lane: Lane) -> bool {
        self.signals.skips(self.step, lane)
    }

    fn keeps_part(&self, node: Node) -> bool {
        self.computed
            .nodes
            .iter()
            .any(|(kept, _)| node.contains(*kept))
    }

    fn kept(&mut self, node: Node) -> Option<Gradient> {
        let found = self.computed.nodes.iter().find(|(n, _)| *n == node)?;
        let sum = found.1.to_vec().into();
        self.say_lanes(node);
        Some(sum)
    }

    fn part(&mut self, node: Node, sum: Gradient) {
        let sum = Arc::new(sum);
        self.computed.nodes.push((node, sum.clone()));
        self.exchange.push(self.step, node, sum);
    }

    fn buffer(&mut self) -> Gradient {
        let lent = self.lends.then(|| self.exchange.buffer()).flatten();
        lent.unwrap_or_default()
    }

    fn progress(&mut self, node: Node, gradient: &Gradient, complete: usize) {
        if node != self.node {
            return;
        }
        if let Some(staying) = &mut self.staying {
            if !self.rounds {
                staying.digests.look(gradient, complete);
            }
        } else if self.lends && complete < gradient.len() {
            // What comes last is pushed as it lies, without a copy.
            self.exchange
                .push_early(self.step, node, gradient, complete);
        }
    }

    fn computed(&mut self, node: Node, time: Duration) {
        let lanes = u64::from(node.size);
        let observer = self.exchange.observer();
        observer.meter.computed(lanes, lanes * self.tokens, time);
        if let Some(span) = observer.spans.begin(self.step) {
            span.ago(time).end_lanes("lane", node);
        }
    }

    fn done(&mut self, lanes: &[(Lane, LaneSums)], time: Duration) {
        let micros = time.as_micros() as u64;
        let kept = lanes.iter().map(|(lane, sums)| (*lane, (*sums, micros)));
        self.computed.lanes.extend(kept);
        let report = self.report(lanes.to_vec(), micros);
        match &mut self.staying {
            Some(staying) if lanes.len() == self.node.size as usize => staying.found = Some(report),
            _ => self.say(report),
        }
    }
}

impl Listener<'_> {
    fn report(&self, lanes: Vec<(Lane, LaneSums)>, micros: u64) -> Report {
        let step = self.step;
        Report::LanesDone {
            step,
            lanes,
            micros,
        }
    }

    fn say(&self, report: Report) {
        // A driver that is gone ends the process.
        let _ = self.out.blocking_send((self.load, report));
    }

    /// Says again what lanes of a kept node have found.
    pub fn say_lanes(&self, node: Node) {
        for lane in node.lanes() {
            if let Some(&(sums, micros)) = self.computed.lanes.get(&lane) {
                self.say(self.report(vec![(lane, sums)], micros));
            }
        }
    }
}
