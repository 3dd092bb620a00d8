//! What can go wrong in the engine.

/// An error of the engine. Nothing has changed when one is returned, except where it says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// A device name that is none.
    #[error("unknown device `{0}`; use `auto`, `cpu` or `cuda:N`")]
    UnknownDevice(String),
    /// CUDA was asked of a build without it.
    #[error(
        "this build has no CUDA, so `cuda:{0}` cannot be used; build with `--features cuda`, or use `--device cpu`"
    )]
    NoCuda(usize),
    /// A CUDA device that does not open.
    #[error("cannot open `cuda:{index}`: {source}")]
    OpenCuda {
        /// The device's number.
        index: usize,
        /// What candle says.
        source: candle_core::Error,
    },
    /// The thread pool could not be made.
    #[error("cannot start {threads} compute threads: {source}")]
    Threads {
        /// How many were asked for.
        threads: usize,
        /// What rayon says.
        source: rayon::ThreadPoolBuildError,
    },
    /// A model shape that no model can have.
    #[error("impossible model: {0}")]
    Model(String),
    /// A batch that does not fit the model.
    #[error("bad batch: {0}")]
    Batch(String),
    /// A flat buffer of the wrong length.
    #[error("{what} hold {got} elements, but the model has {expected} parameters")]
    Length {
        /// Which buffer.
        what: &'static str,
        /// Its length.
        got: usize,
        /// The layout's length.
        expected: usize,
    },
    /// Training was asked of an engine without optimizer moments.
    #[error(
        "this engine was made for inference and has no optimizer; pass a train config to `Engine::new`"
    )]
    InferenceOnly,
    /// A step number that no update can have.
    #[error("the first update is step 1, got step {0}")]
    Step(u64),
    /// A generation request that makes no sense.
    #[error("bad sampling: {0}")]
    Sampling(String),
    /// candle failed.
    #[error("tensor operation failed: {0}")]
    Tensor(#[from] candle_core::Error),
}

/// Result of the engine.
pub type Result<T> = std::result::Result<T, EngineError>;
