//! What goes wrong with data elsewhere, as sentences: which URL, what the server said, what to look at. A URL is shown without
//! its query, and of a server's answer only its code and its sentence, as either may hold what should not be shown.

use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};

use http::StatusCode;
use object_store::client::{HttpError, HttpErrorKind};

use crate::location::LocationError;

/// Longest part of a server's answer that is shown, in bytes.
const SHOWN: usize = 300;

/// Why data elsewhere cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum ObjectError {
    /// The URL.
    #[error(transparent)]
    Location(#[from] LocationError),
    /// The environment does not say how to use the store.
    #[error(
        "cannot use `{url}`: {reason}; look at the variables of the coordinator's environment (docs/storage.md)"
    )]
    Setup {
        /// What was named.
        url: String,
        /// What is wrong.
        reason: String,
    },
    /// It cannot be used in this way.
    #[error("cannot use `{url}`: {reason}")]
    Unusable {
        /// What was named.
        url: String,
        /// Why, and what to do instead.
        reason: String,
    },
    /// There is nothing of that name.
    #[error("there is no `{url}`{}; check the name", said(.reason))]
    Missing {
        /// What was named.
        url: String,
        /// What the server said.
        reason: String,
    },
    /// The server does not allow it.
    #[error(
        "`{url}` is refused{}; check the credentials in the coordinator's environment, and what they allow",
        said(.reason)
    )]
    Denied {
        /// What was named.
        url: String,
        /// What the server said.
        reason: String,
    },
    /// It is another one than before.
    #[error("`{url}` changed while it was read; try again when it rests")]
    Changed {
        /// What was named.
        url: String,
    },
    /// Nobody answers, or the connection breaks again and again.
    #[error("`{url}` cannot be reached: {reason}; check the address and the network")]
    Unreachable {
        /// What was named.
        url: String,
        /// Why.
        reason: String,
    },
    /// It may not be called on somebody's behalf.
    #[error("`{url}` is not fetched: {reason}")]
    Refused {
        /// What was named.
        url: String,
        /// Why.
        reason: String,
    },
    /// The server answers with an error.
    #[error("the server of `{url}` answers {reason}")]
    Server {
        /// What was named.
        url: String,
        /// What it says.
        reason: String,
        /// The status of HTTP.
        status: u16,
        /// Whether another try may help.
        transient: bool,
    },
    /// More than may be.
    #[error("`{url}` has {bytes} bytes or more; at most {most} are expected")]
    Large {
        /// What was named.
        url: String,
        /// Its size.
        bytes: u64,
        /// The bound.
        most: u64,
    },
    /// Its content is not what it should be.
    #[error("`{url}` is damaged: its BLAKE3 is {found}, not {expected}")]
    Damaged {
        /// What was named.
        url: String,
        /// The hash of what is there.
        found: String,
        /// The hash that it should have.
        expected: String,
    },
    /// The disk is full.
    #[error(
        "the disk is full: `{}` cannot grow further; {missing} bytes of `{url}` are missing; free space there, or choose another home with \
         `--home`, and try again: what is there stays",
        path.display()
    )]
    Full {
        /// What was named.
        url: String,
        /// Where it was written to.
        path: PathBuf,
        /// What does not fit.
        missing: u64,
    },
    /// A file of this machine.
    #[error("cannot use the file `{}`", path.display())]
    Disk {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

fn said(reason: &str) -> String {
    match reason {
        "" => String::new(),
        reason => format!(" ({reason})"),
    }
}

impl ObjectError {
    /// Whether another try, a little later, may go well.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unreachable { .. } => true,
            Self::Server { transient, .. } => *transient,
            _ => false,
        }
    }

    /// Whether it is only that there is no such thing.
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::Missing { .. })
    }

    pub(super) fn disk(path: &Path) -> impl Fn(io::Error) -> Self {
        move |source| Self::Disk {
            path: path.to_owned(),
            source,
        }
    }

    /// What an error of `object_store` means for a URL.
    pub(super) fn of_store(url: impl ToString, error: object_store::Error) -> Self {
        use object_store::Error as Store;
        let url = url.to_string();
        let reason = answer(&error);
        match error {
            Store::NotFound { .. } => Self::Missing { url, reason },
            Store::PermissionDenied { .. } | Store::Unauthenticated { .. } => {
                Self::Denied { url, reason }
            }
            Store::Precondition { .. } | Store::NotModified { .. } => Self::Changed { url },
            Store::Generic { .. } => match http_error(&error) {
                Some(error) => Self::of_http(url, error),
                None => Self::of_answer(url, reason, &error),
            },
            _ => Self::Setup { url, reason },
        }
    }

    /// An answer that is an error, or a store that could not even ask.
    fn of_answer(url: String, reason: String, error: &object_store::Error) -> Self {
        let Some(status) = status_in(&chain(error)) else {
            return Self::Setup { url, reason };
        };
        Self::of_status(url, status, reason)
    }

    /// What a status of HTTP means.
    pub(super) fn of_status(url: impl ToString, status: StatusCode, reason: String) -> Self {
        let url = url.to_string();
        match status {
            StatusCode::NOT_FOUND | StatusCode::GONE => Self::Missing { url, reason },
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Self::Denied { url, reason },
            StatusCode::PRECONDITION_FAILED | StatusCode::RANGE_NOT_SATISFIABLE => {
                Self::Changed { url }
            }
            status => Self::Server {
                url,
                reason: format!("{status}{}", said(&reason)),
                status: status.as_u16(),
                transient: (status.is_server_error() && status != StatusCode::NOT_IMPLEMENTED)
                    || matches!(
                        status,
                        StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS
                    ),
            },
        }
    }

    /// What an error of the connection means.
    pub(super) fn of_http(url: impl ToString, error: &HttpError) -> Self {
        let url = url.to_string();
        let reason = without_queries(&root(error));
        match error.kind() {
            HttpErrorKind::Unknown | HttpErrorKind::Decode => Self::Refused { url, reason },
            _ => Self::Unreachable { url, reason },
        }
    }
}

/// An error and what caused it, as one sentence.
pub(super) fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let next = error.to_string();
        // Many errors repeat their cause.
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        source = error.source();
    }
    text
}

/// The sentence of what was wrong at first.
fn root(error: &(dyn Error + 'static)) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

/// Whether a request may have been carried out, and its answer did not come.
pub(super) fn is_lost(error: &object_store::Error) -> bool {
    let kind = http_error(error).map(HttpError::kind);
    matches!(
        kind,
        Some(HttpErrorKind::Interrupted | HttpErrorKind::Timeout)
    )
}

/// The innermost error of a connection.
fn http_error<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a HttpError> {
    let mut found = None;
    let mut source = Some(error);
    while let Some(error) = source {
        found = error.downcast_ref::<HttpError>().or(found);
        source = error.source();
    }
    found
}

/// What is worth showing of an answer: code and sentence where a store gives them, else its beginning.
fn answer(error: &object_store::Error) -> String {
    let text = chain(error);
    let part = |tag: &str| {
        let from = text.find(&format!("<{tag}>"))? + tag.len() + 2;
        let to = text[from..].find(&format!("</{tag}>"))? + from;
        Some(&text[from..to])
    };
    match (part("Code"), part("Message")) {
        (Some(code), Some(sentence)) => shorten(&format!("{code}: {sentence}")),
        (Some(code), None) => shorten(code),
        // Other markup, and signatures, are of no use to people.
        _ if status_in(&text).is_some() => String::new(),
        _ => shorten(&without_queries(&text)),
    }
}

/// The status that a text of `object_store` quotes.
fn status_in(text: &str) -> Option<StatusCode> {
    let after = text.split("status code: ").nth(1)?;
    let digits = after.get(..3)?;
    StatusCode::from_bytes(digits.as_bytes()).ok()
}

/// The text with what follows the `?` of URLs left out.
fn without_queries(text: &str) -> String {
    let words = text.split(' ').map(|word| match word.split_once('?') {
        Some((url, _)) if url.contains("://") => url,
        _ => word,
    });
    words.collect::<Vec<_>>().join(" ")
}

fn shorten(text: &str) -> String {
    let text = text.trim().replace(['\n', '\r'], " ");
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Said(&'static str);

    fn generic(text: &'static str) -> object_store::Error {
        object_store::Error::Generic {
            store: "S3",
            source: Box::new(Said(text)),
        }
    }

    #[test]
    fn a_servers_answer_is_shown_without_what_it_quotes() {
        let error = object_store::Error::PermissionDenied {
            path: "x".into(),
            source: Box::new(Said(
                "Error performing GET http://h/b/x in 1ms - Server returned non-2xx status code: 403 Forbidden: \
                 <Error><Code>SignatureDoesNotMatch</Code><Message>The signature does not match</Message>\
                 <AWSAccessKeyId>AKIA</AWSAccessKeyId><StringToSign>secret</StringToSign></Error>",
            )),
        };
        let error = ObjectError::of_store("s3://b/x", error);
        assert_eq!(
            error.to_string(),
            "`s3://b/x` is refused (SignatureDoesNotMatch: The signature does not match); check the credentials in the \
             coordinator's environment, and what they allow"
        );
    }

    #[test]
    fn what_may_pass_is_told_apart() {
        let busy = ObjectError::of_store(
            "s3://b/x",
            generic("Server returned non-2xx status code: 503 Service Unavailable: "),
        );
        assert!(busy.is_transient());
        assert_eq!(
            busy.to_string(),
            "the server of `s3://b/x` answers 503 Service Unavailable"
        );
        let setup = ObjectError::of_store(
            "s3://b/x",
            generic("no region at https://h/b?sig=secret for this"),
        );
        assert!(!setup.is_transient());
        assert!(
            setup
                .to_string()
                .contains("no region at https://h/b for this")
        );
        let gone = ObjectError::of_status("https://h/x", StatusCode::NOT_FOUND, String::new());
        assert_eq!(
            gone.to_string(),
            "there is no `https://h/x`; check the name"
        );
    }
}
