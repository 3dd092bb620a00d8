//! placeholder
use crate::spec::TrainConfig;
/// x
pub fn learning_rate(train: &TrainConfig, _step: u64) -> f64 { train.learning_rate }
