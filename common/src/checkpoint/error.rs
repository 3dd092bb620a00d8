//! What can be wrong with a checkpoint, each with the file, what was expected and what was found.

use std::io;
use std::path::{Path, PathBuf};

use crate::hf::HfError;
use crate::supervised::TokenizerConfigError;

/// An error of reading or writing a checkpoint or a Hugging Face directory.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The operating system refused.
    #[error("cannot {action} `{}`", path.display())]
    Io {
        /// Verb: `read`, `write`, `create`…
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The directory itself is not there.
    #[error("no checkpoint at `{}`: there is no such directory", .0.display())]
    NoDirectory(PathBuf),
    /// A file that has to be there is not.
    #[error("`{}` is missing; restore it, or use another checkpoint", .0.display())]
    MissingFile(PathBuf),
    /// A file is shorter or longer than its manifest says.
    #[error(
        "`{}` has {found} bytes, its manifest says {expected}: it was cut or changed; use another checkpoint",
        path.display()
    )]
    WrongSize {
        /// The file.
        path: PathBuf,
        /// Bytes by the manifest.
        expected: u64,
        /// Bytes on disk.
        found: u64,
    },
    /// A file's content is not what its manifest says.
    #[error(
        "`{}` is damaged: its blake3 is `{found}`, its manifest says `{expected}`; use another checkpoint",
        path.display()
    )]
    WrongHash {
        /// The file.
        path: PathBuf,
        /// Hash by the manifest, hex.
        expected: String,
        /// Hash on disk, hex.
        found: String,
    },
    /// The state differs from the state hash that goes with it.
    #[error(
        "the state in `{}` hashes to `{found}`, expected `{expected}`; the checkpoint is not kept",
        path.display()
    )]
    WrongState {
        /// The checkpoint.
        path: PathBuf,
        /// Hash by the ledger or the manifest, hex.
        expected: String,
        /// Hash of the bytes, hex.
        found: String,
    },
    /// `config.json` describes a model that Cohort cannot run.
    #[error("`{}` cannot be used", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// Which field.
        source: HfError,
    },
    /// `tokenizer_config.json` says something of conversations that cannot be understood.
    #[error("`{}` cannot be used", path.display())]
    TokenizerConfig {
        /// The file.
        path: PathBuf,
        /// Which key.
        source: TokenizerConfigError,
    },
    /// A file does not have the form that its name promises.
    #[error("`{}` is not valid: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A tensor that the model needs is not there.
    #[error("`{}` has no tensor `{name}`, which the model calls for", path.display())]
    MissingTensor {
        /// The weights file or index.
        path: PathBuf,
        /// Hugging Face name.
        name: String,
    },
    /// A tensor that the model does not know.
    #[error("`{}` holds a tensor `{name}`, which the model does not call for", path.display())]
    UnexpectedTensor {
        /// The weights file.
        path: PathBuf,
        /// Name in the file.
        name: String,
    },
    /// A tensor of another shape.
    #[error(
        "tensor `{name}` in `{}` has the shape {found:?}, the model calls for {expected:?}",
        path.display()
    )]
    WrongShape {
        /// The weights file.
        path: PathBuf,
        /// Name in the file.
        name: String,
        /// Shape by the layout.
        expected: Vec<usize>,
        /// Shape in the file.
        found: Vec<usize>,
    },
    /// A tensor of a type that is not converted.
    #[error("tensor `{name}` in `{}` is of type `{dtype}`; F32, F16 and BF16 can be read", path.display())]
    WrongType {
        /// The weights file.
        path: PathBuf,
        /// Name in the file.
        name: String,
        /// The type in the file.
        dtype: String,
    },
    /// A model without biases whose file has a bias that is not zero.
    #[error(
        "tensor `{name}` in `{}` is not zero, but config.json says `\"bias\": false`; set it to true",
        path.display()
    )]
    BiasNotZero {
        /// The weights file.
        path: PathBuf,
        /// Name in the file.
        name: String,
    },
    /// The stream of the state had another length than the model.
    #[error("the state of `{}` takes {expected} bytes, {found} came", path.display())]
    WrongLength {
        /// The checkpoint.
        path: PathBuf,
        /// Bytes of parameters and both moments.
        expected: u64,
        /// Bytes received.
        found: u64,
    },
    /// Adapters that are not there.
    #[error("`{}` holds no adapters: there is no `adapter_config.json`", .0.display())]
    NoAdapter(PathBuf),
    /// Adapters on a base that has some already.
    #[error("`{}` has adapters of its own; others can only be put on the base that they stand on", .0.display())]
    Adapted(PathBuf),
    /// Something else already lies where the result would go.
    #[error("`{}` already exists; choose another place or remove it", .0.display())]
    Exists(PathBuf),
}

impl CheckpointError {
    /// For `map_err` on an operation on `path`.
    pub(super) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| match (source.kind(), action) {
            (io::ErrorKind::NotFound, "read") => Self::MissingFile(path),
            _ => Self::Io {
                action,
                path,
                source,
            },
        }
    }

    pub(super) fn malformed(path: &Path, reason: impl std::fmt::Display) -> Self {
        Self::Malformed {
            path: path.to_owned(),
            reason: reason.to_string(),
        }
    }
}
