//! What a user asks for: the typed TOML of a spec, and the run spec that the rest trusts.

mod model;
mod run;

pub use model::{Architecture, ModelConfig};
pub use run::{CheckpointConfig, RunKind, RunSpec, ScheduleKind, StartPoint, TrainConfig};
