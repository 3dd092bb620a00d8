//! Validations: the units of a split are handed out, redone when their worker is lost, and put together in their order.
//! What a run writes after its prompts is a split, too, whose units have tokens in the place of a loss.

use crate::cluster::coordinator::Machine;
use crate::cluster::events::{Action, LeftReason};
use crate::cluster::hands::Hands;
use crate::cluster::messages::{Found, Scores, ToWorker};
use crate::cluster::run::{Active, EvalInFlight, Phase};
use crate::ids::{RunId, SessionId, Step};
use crate::lanes;

impl Machine {
    pub(super) fn start_eval(&mut self, now: u64, split: u32, out: &mut Vec<Action>) {
        let active = self.active.as_ref().expect("a run is at a boundary");
        let units = active.plan.splits[split as usize].units;
        if units == 0 {
            return self.at_boundary(now, out);
        }
        let speed = |s: &SessionId| (*s, self.lane_time(*s));
        let ready: Vec<_> = active.ready.iter().map(speed).collect();
        let active = self.active.as_mut().expect("a run is at a boundary");
        let mut hands = Hands::new(units);
        for (session, range) in lanes::assign(units, &ready) {
            let units: Vec<u32> = range.collect();
            active.send_units(session, split, &units, out);
            hands.give(session, units);
        }
        active.phase = Phase::Evaluating(EvalInFlight {
            split,
            hands,
            found: vec![None; units as usize],
            missing: units as usize,
        });
    }

    pub(super) fn unit_done(
        &mut self,
        now: u64,
        session: SessionId,
        (run, step, split): (&RunId, Step, u32),
        unit: u32,
        found: Found,
        out: &mut Vec<Action>,
    ) {
        let Some(active) = self.active_as(run) else {
            return;
        };
        let (at, splits) = (active.step, active.plan.splits.clone());
        let Phase::Evaluating(eval) = &mut active.phase else {
            return;
        };
        if step != at || eval.split != split || unit as usize >= eval.found.len() {
            return;
        }
        let split_of = &splits[split as usize];
        if split_of.scores() != matches!(found, Found::Scores(_)) {
            let what = format!(
                "its answer to unit {unit} of `{}` is of another kind",
                split_of.label
            );
            return self.expel(now, session, LeftReason::Protocol(what), out);
        }
        eval.hands.close(unit);
        if eval.found[unit as usize].replace(found).is_none() {
            eval.missing -= 1;
        }
        if eval.missing > 0 {
            return;
        }
        let found = std::mem::take(&mut eval.found);
        active.conclude(split, found.into_iter().flatten(), out);
        self.at_boundary(now, out);
    }

    pub(super) fn redo_units(&mut self, lost: SessionId, out: &mut Vec<Action>) {
        let active = self.active.as_mut().expect("a validation is in flight");
        let Phase::Evaluating(eval) = &mut active.phase else {
            unreachable!("called with a validation in flight");
        };
        let missing = eval.hands.leave(lost);
        let split = eval.split;
        let moves = lanes::reassign(&missing, eval.hands.by_load());
        for (session, units) in &moves {
            eval.hands.give(*session, units.iter().copied());
        }
        for (session, units) in moves {
            active.send_units(session, split, &units, out);
        }
    }
}

impl Active {
    /// Every unit of a split is done; `found` is in their order.
    fn conclude(&mut self, split: u32, found: impl Iterator<Item = Found>, out: &mut Vec<Action>) {
        // In unit order, in f64: the same bits whoever scored which unit.
        let mut scores = Scores::default();
        let mut written = Vec::new();
        for unit in found {
            match unit {
                Found::Scores(unit) => scores.add(&unit),
                Found::Written(tokens) => written.push(tokens),
            }
        }
        let (run, step) = (self.plan.run.clone(), self.step);
        if !self.plan.splits[split as usize].scores() {
            out.push(Action::Sampled { run, step, written });
            return;
        }
        let loss = scores.sums.loss / scores.sums.weight;
        out.push(Action::Evaluated {
            run: run.clone(),
            step,
            split,
            scores,
        });
        self.learn(split, loss);
        let has_loss = |split: &u32| self.plan.splits[*split as usize].scores();
        if self.boundary.evals.iter().any(has_loss) {
            return;
        }
        if let Some(verdict) = self.verdict() {
            let text = verdict.to_string();
            out.push(Action::Note {
                run: Some(run),
                text,
            });
            self.owe_the_end();
        }
    }

    /// The run ends here, so that what is written at the end is due as well.
    fn owe_the_end(&mut self) {
        let all = 0..self.plan.splits.len() as u32;
        let writes = |split: &u32| !self.plan.splits[*split as usize].scores();
        self.boundary.evals = all.filter(writes).rev().collect();
    }

    fn send_units(&self, session: SessionId, split: u32, units: &[u32], out: &mut Vec<Action>) {
        if units.is_empty() {
            return;
        }
        let message = ToWorker::Evaluate {
            run: self.plan.run.clone(),
            step: self.step,
            split,
            units: units.to_vec(),
        };
        out.push(Action::Send { session, message });
    }
}
