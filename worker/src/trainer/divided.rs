//! Commits where moments are divided among the workers: what this worker keeps it updates, and the rest comes from those who
//! keep it.

use std::ops::Range;

use cohort_common::cluster::worker::Report;
use cohort_common::ids::Step;
use cohort_common::layout::{CHUNK_LEN, chunks_range};

use super::{Commit, Loaded, update_of};
use crate::exchange::Arrived;
use crate::figures::Doing;
use crate::kept::KeptError;
use crate::lanes::Stop;

impl Loaded {
    /// Applies a commit: what is kept here is updated, and the rest comes from those who keep it.
    pub(super) fn commit_kept(&mut self, commit: &Commit) -> Result<(), Stop> {
        let step = commit.step();
        let observer = self.exchange.observer();
        let meter = observer.meter.clone();
        let here = self.step + 1 == step;
        let root = || meter.during(Doing::Nothing, || self.exchange.root(step));
        let Some(root) = here.then(root).flatten() else {
            self.say(Report::GaveUp { step });
            return Ok(());
        };
        let span = observer.spans.begin(step);
        if !commit.proof.skipped {
            let kept = self.kept.as_mut().expect("moments are divided");
            let updated = kept.update(&mut self.engine, &root, update_of(commit));
            updated.map_err(|error| match error {
                KeptError::Engine(error) => Stop::from(error),
                KeptError::File(error) => Stop::Unable(kept_error(&error)),
            })?;
            if let Some(own) = kept.own() {
                let first = (own.start / CHUNK_LEN) as u32;
                let params = &self.engine.params()[own];
                self.exchange.publish(step, first, params);
            }
            let params = meter.during(Doing::Nothing, || self.params_of_others(step))?;
            let kept = self.kept.as_ref().expect("moments are divided");
            self.engine.take_params(kept.others(), &params)?;
            self.exchange.reuse_params(params);
        }
        meter.updated();
        if let Some(span) = span {
            span.end("update");
        }
        self.exchange.reuse(root);
        self.applied(commit, None)
    }

    /// Waits for the new parameters of what others keep.
    fn params_of_others(&self, step: Step) -> Result<Vec<f32>, Stop> {
        loop {
            match self.exchange.params(step) {
                Arrived::All(params) => return Ok(params),
                Arrived::Serve(of, chunks) if of == step => self.send(of, chunks),
                Arrived::Serve(..) => {}
                Arrived::Closed => {
                    // A part of the state is of this step, the rest of the one before.
                    self.say(Report::Torn { step });
                    return Err(Stop::Cancelled);
                }
                Arrived::Late(after) => {
                    let message = format!(
                        "the parameters after step {step} did not arrive from all other workers within {} s; look at the network between them",
                        after.as_secs()
                    );
                    return Err(Stop::Unable(message));
                }
            }
        }
    }

    /// Sends parameters in the place of an owner that is lost.
    fn send(&self, step: Step, chunks: Range<u32>) {
        let params = self.engine.params();
        if let Some(slice) = chunks_range(&chunks, params.len()) {
            self.exchange.publish(step, chunks.start, &params[slice]);
        }
    }

    /// Sends what the exchange was asked to serve, of the state that is here.
    pub(super) fn serve(&self) {
        while let Some((step, chunks)) = self.exchange.next_serve() {
            if step == self.step {
                self.send(step, chunks);
            }
        }
    }
}

/// What is said of a file that cannot be used.
pub(super) fn kept_error(error: &std::io::Error) -> String {
    format!(
        "the file of the moments that this worker keeps for another, in its cache, cannot be used: {error}; make room there, or start it with another `--home`"
    )
}
