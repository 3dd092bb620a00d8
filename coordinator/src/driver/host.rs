//! The coordinator as the host of the exchange: what becomes of the sums is an event of its machine.

use std::time::SystemTime;

use cohort_common::aggregate::RootTotals;
use cohort_common::cluster::Event;
use cohort_common::cluster::events::LeftReason;
use cohort_common::exchange::{Host, Told};
use cohort_common::ids::SessionId;

use super::Cluster;

#[tonic::async_trait]
impl Host for Cluster {
    fn is_open(&self, session: SessionId) -> bool {
        self.sessions().contains(&session)
    }

    fn now(&self) -> SystemTime {
        SystemTime::now()
    }

    async fn tell(&self, told: Told) {
        self.send(event_of(told)).await;
    }
}

fn event_of(told: Told) -> Event {
    match told {
        Told::Delivered { run, step, lanes } => Event::Delivered { run, step, lanes },
        Told::Complete { run, step, digests } => {
            let totals = RootTotals::of(&digests);
            Event::RootComplete { run, step, totals }
        }
        Told::Broken { session, what } => {
            let reason = LeftReason::Protocol(format!("in the exchange, {what}"));
            Event::Left { session, reason }
        }
        Told::Mismatch { run, step, error } => {
            let error = format!(
                "step {step}: {error}; take the one away that you trust less, then `cohort resume {run}`"
            );
            Event::RunBroken { run, error }
        }
    }
}

#[cfg(test)]
mod tests {
    use cohort_common::aggregate::OfferError;
    use cohort_common::ids::RunId;
    use cohort_common::tree::Node;

    use super::*;

    #[test]
    fn what_cannot_be_relied_on_is_said_in_full() {
        let told = Told::Broken {
            session: SessionId(3),
            what: "message 2 is missing".into(),
        };
        let Event::Left { session, reason } = event_of(told) else {
            panic!("its session ends");
        };
        assert_eq!(session, SessionId(3));
        assert_eq!(reason.to_string(), "in the exchange, message 2 is missing");
        let told = Told::Mismatch {
            run: RunId::new("fox"),
            step: 5,
            error: OfferError::Mismatch {
                index: 1,
                node: Node::leaf(0),
                first: SessionId(3),
                second: SessionId(4),
            },
        };
        let Event::RunBroken { run, error } = event_of(told) else {
            panic!("nobody knows which is right");
        };
        assert_eq!(run, RunId::new("fox"));
        assert!(error.starts_with("step 5: workers "), "{error}");
        assert!(error.ends_with("then `cohort resume fox`"), "{error}");
    }
}
