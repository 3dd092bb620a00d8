//! gRPC statuses for the errors of this crate.

use tonic::Status;

use crate::store::StoreError;

/// The caller asked for something that cannot be.
pub fn invalid(error: impl ToString) -> Status {
    Status::invalid_argument(error.to_string())
}

/// The thing does not exist.
pub fn missing(error: impl ToString) -> Status {
    Status::not_found(error.to_string())
}

/// The thing is not in a state that allows it.
pub fn refused(error: impl ToString) -> Status {
    Status::failed_precondition(error.to_string())
}

/// Something on this side went wrong.
pub fn failed(error: impl ToString) -> Status {
    Status::internal(error.to_string())
}

/// An error of the store.
pub fn store_status(error: StoreError) -> Status {
    match error {
        StoreError::UnknownRun(_) => missing(error),
        error => failed(error),
    }
}

/// An error with its causes, as one sentence.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
