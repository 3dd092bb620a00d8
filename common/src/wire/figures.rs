//! A worker's figures on the wire, and what else it says that is no message of the cluster's logic.

use cohort_proto::v1;

use super::{WireError, from_worker_from, run_id};
use crate::cluster::FromWorker;
use crate::figures::{Counters, Figures};
use crate::process::Usage;

/// What a worker says after its `Register`.
#[derive(Clone, Debug)]
pub enum Heard {
    /// Something for the cluster's machine.
    Said(FromWorker),
    /// What it did with its time. Nothing that a run computes depends on it.
    Figures(Figures),
}

/// What a worker says, from the wire.
pub fn heard_from(message: v1::FromWorker) -> Result<Heard, WireError> {
    match message.kind {
        Some(v1::from_worker::Kind::Figures(figures)) => figures_from(figures).map(Heard::Figures),
        kind => from_worker_from(v1::FromWorker { kind }).map(Heard::Said),
    }
}

/// A worker's figures, on the wire.
pub fn figures_to(figures: &Figures) -> v1::FromWorker {
    let Figures {
        run,
        counters,
        usage,
    } = figures;
    let (run, step) = match run {
        Some((run, step)) => (run.as_str().to_owned(), *step),
        None => (String::new(), 0),
    };
    let kind = v1::from_worker::Kind::Figures(v1::Figures {
        run,
        step,
        compute_us: counters.compute_us,
        exchange_us: counters.exchange_us,
        wait_us: counters.wait_us,
        data_us: counters.data_us,
        tokens: counters.tokens,
        steps: counters.steps,
        lanes: counters.lanes,
        lanes_us: counters.lanes_us,
        sent_bytes: counters.sent_bytes,
        received_bytes: counters.received_bytes,
        rss_bytes: usage.map(|usage| usage.rss_bytes),
        cpu_us: usage.map(|usage| usage.cpu_us),
    });
    v1::FromWorker { kind: Some(kind) }
}

fn figures_from(figures: v1::Figures) -> Result<Figures, WireError> {
    let run = match figures.run.as_str() {
        "" => None,
        name => Some((run_id(name)?, figures.step)),
    };
    let usage = figures.rss_bytes.zip(figures.cpu_us);
    Ok(Figures {
        run,
        counters: Counters {
            compute_us: figures.compute_us,
            exchange_us: figures.exchange_us,
            wait_us: figures.wait_us,
            data_us: figures.data_us,
            tokens: figures.tokens,
            steps: figures.steps,
            lanes: figures.lanes,
            lanes_us: figures.lanes_us,
            sent_bytes: figures.sent_bytes,
            received_bytes: figures.received_bytes,
        },
        usage: usage.map(|(rss_bytes, cpu_us)| Usage { rss_bytes, cpu_us }),
    })
}

/// Floating-point operations a second that a worker measured; `None` where it says none, or nonsense.
pub fn peak_from(register: &v1::Register) -> Option<f64> {
    let peak = register.peak_flops;
    (peak.is_finite() && peak > 0.0).then_some(peak)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use prost::Message;

    use super::*;
    use crate::ids::RunId;

    fn counters() -> impl Strategy<Value = Counters> {
        any::<[u64; 10]>().prop_map(|n| Counters {
            compute_us: n[0],
            exchange_us: n[1],
            wait_us: n[2],
            data_us: n[3],
            tokens: n[4],
            steps: n[5],
            lanes: n[6],
            lanes_us: n[7],
            sent_bytes: n[8],
            received_bytes: n[9],
        })
    }

    proptest! {
        #[test]
        fn figures_come_back(counters in counters(), step: u64, busy: bool, told: bool) {
            let figures = Figures {
                run: busy.then(|| (RunId::new("tiny-1"), step)),
                counters,
                usage: told.then_some(Usage { rss_bytes: 0, cpu_us: step }),
            };
            let bytes = figures_to(&figures).encode_to_vec();
            let heard = heard_from(v1::FromWorker::decode(bytes.as_slice()).unwrap()).unwrap();
            let Heard::Figures(back) = heard else { panic!("{heard:?}") };
            prop_assert_eq!(back, figures);
        }
    }

    #[test]
    fn other_messages_pass_and_nonsense_does_not() {
        let message = super::super::from_worker(FromWorker::Heartbeat);
        assert!(matches!(
            heard_from(message),
            Ok(Heard::Said(FromWorker::Heartbeat))
        ));
        assert!(heard_from(v1::FromWorker { kind: None }).is_err());
        let kind = v1::from_worker::Kind::Figures(v1::Figures {
            run: "../x".into(),
            ..v1::Figures::default()
        });
        assert!(heard_from(v1::FromWorker { kind: Some(kind) }).is_err());
    }

    #[test]
    fn a_peak_is_a_positive_number() {
        let peak = |peak_flops| {
            peak_from(&v1::Register {
                peak_flops,
                ..v1::Register::default()
            })
        };
        assert_eq!(peak(5e10), Some(5e10));
        assert_eq!(peak(0.0), None);
        assert_eq!(peak(-1.0), None);
        assert_eq!(peak(f64::NAN), None);
        assert_eq!(peak(f64::INFINITY), None);
    }
}
