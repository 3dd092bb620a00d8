//! Steps out of the ordinary, and figures that may be no numbers.

use serde::{Deserialize, Serialize};

use crate::cluster::Anomaly;

/// A committed step is out of the ordinary.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AnomalyEvent {
    /// The run.
    pub run: String,
    /// The step.
    pub step: u64,
    /// Which figure: `loss` or `grad_norm`.
    pub what: String,
    /// Its value; absent if it is not finite.
    pub value: Option<f64>,
    /// Mean of that figure over the applied steps before; absent where the value is not finite.
    pub mean: Option<f64>,
    /// Its standard deviation there; absent likewise.
    pub sigma: Option<f64>,
    /// What becomes of the step: `tell`, `skip` or `pause`.
    pub action: String,
    /// The same in plain words.
    pub text: String,
}

impl AnomalyEvent {
    /// The event of an anomaly.
    pub fn of(run: String, anomaly: &Anomaly) -> Self {
        let (mean, sigma) = anomaly.usual.unzip();
        Self {
            run,
            step: anomaly.step,
            what: anomaly.what.as_str().into(),
            value: anomaly.value.is_finite().then_some(anomaly.value),
            mean,
            sigma,
            action: anomaly.action.as_str().into(),
            text: anomaly.to_string(),
        }
    }
}

/// Floats that may be no numbers: JSON has `null` for those.
pub(super) mod maybe_nan {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub fn serialize<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        value.is_finite().then_some(*value).serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
    }
}

#[cfg(test)]
mod tests {
    use crate::api::{RunEvent, StepEvent};

    #[test]
    fn a_step_that_was_skipped_can_be_read_back() {
        let step = StepEvent {
            run: "tiny-1".into(),
            step: 3,
            steps: 9,
            loss: f64::INFINITY,
            grad_norm: f64::NAN,
            learning_rate: 0.1,
            tokens: 7,
            tokens_per_second: 1.0,
            epoch: 0.5,
            bits_per_byte: None,
            mfu: None,
            skipped: true,
        };
        let json = serde_json::to_string(&RunEvent::Step(step)).unwrap();
        assert!(json.contains(r#""loss":null,"grad_norm":null"#), "{json}");
        let RunEvent::Step(back) = serde_json::from_str(&json).unwrap() else {
            panic!("{json}");
        };
        assert!(back.loss.is_nan() && back.grad_norm.is_nan() && back.skipped);
        let plain = json
            .replace("null", "1.5")
            .replace(r#","skipped":true"#, "");
        let RunEvent::Step(back) = serde_json::from_str(&plain).unwrap() else {
            panic!("{plain}");
        };
        assert_eq!((back.loss, back.skipped), (1.5, false));
    }
}
