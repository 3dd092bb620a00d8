//! The page: files that are part of the binary. A browser that has one already is told so by its ETag.

use std::sync::LazyLock;

use axum::extract::Path;
use axum::http::StatusCode;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, ETAG, HeaderMap, IF_NONE_MATCH};
use axum::response::{IntoResponse, Response};

use super::error::Failure;

const HTML: &str = "text/html; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";
const STYLE: &str = "text/css; charset=utf-8";
const PICTURE: &str = "image/svg+xml";

/// A file: its name below `/page/`, its type, its content.
type Asset = (&'static str, &'static str, &'static [u8]);

macro_rules! asset {
    ($name:literal, $kind:ident) => {
        ($name, $kind, include_bytes!(concat!("page/", $name)))
    };
}

/// All files of the page.
static ASSETS: &[Asset] = &[
    asset!("actions.js", SCRIPT),
    asset!("api.js", SCRIPT),
    asset!("app.js", SCRIPT),
    asset!("chart.js", SCRIPT),
    asset!("charts.js", SCRIPT),
    asset!("checkpoints.js", SCRIPT),
    asset!("classes.js", SCRIPT),
    asset!("cluster.js", SCRIPT),
    asset!("compare.js", SCRIPT),
    asset!("dom.js", SCRIPT),
    asset!("format.js", SCRIPT),
    asset!("headline.js", SCRIPT),
    asset!("history.js", SCRIPT),
    asset!("icon.svg", PICTURE),
    asset!("index.html", HTML),
    asset!("live.js", SCRIPT),
    asset!("lookup.js", SCRIPT),
    asset!("plot.js", SCRIPT),
    asset!("run.js", SCRIPT),
    asset!("runs.js", SCRIPT),
    asset!("samples.js", SCRIPT),
    asset!("scale.js", SCRIPT),
    asset!("signin.js", SCRIPT),
    asset!("spec.js", SCRIPT),
    asset!("style.css", STYLE),
    asset!("theme.js", SCRIPT),
    asset!("timeline.js", SCRIPT),
    asset!("workers.js", SCRIPT),
];

/// The ETags of [`ASSETS`].
static TAGS: LazyLock<Vec<String>> = LazyLock::new(|| {
    let tag = |(_, _, content): &Asset| format!("\"{}\"", &blake3::hash(content).to_hex()[..20]);
    ASSETS.iter().map(tag).collect()
});

/// The page itself, whatever it is to show.
pub async fn page(headers: HeaderMap) -> Result<Response, Failure> {
    serve("index.html", &headers)
}

/// `GET /page/FILE`.
pub async fn file(Path(file): Path<String>, headers: HeaderMap) -> Result<Response, Failure> {
    serve(&file, &headers)
}

fn serve(name: &str, headers: &HeaderMap) -> Result<Response, Failure> {
    let place = ASSETS.iter().position(|(file, _, _)| *file == name);
    let place = place.ok_or_else(|| Failure::missing(format!("the page has no file `{name}`")))?;
    let (_, kind, content) = ASSETS[place];
    let tag = TAGS[place].as_str();
    // Kept, but asked for again each time: after an upgrade nothing old is shown.
    let kept = [(ETAG, tag), (CACHE_CONTROL, "no-cache")];
    let known = headers.get_all(IF_NONE_MATCH).iter();
    let mut known = known.filter_map(|value| value.to_str().ok());
    if known.any(|tags| tags.split(',').any(|one| matches(one, tag))) {
        return Ok((StatusCode::NOT_MODIFIED, kept).into_response());
    }
    Ok((kept, [(CONTENT_TYPE, kind)], content).into_response())
}

/// Whether one of the tags that a browser names means this one.
fn matches(named: &str, tag: &str) -> bool {
    let named = named.trim();
    named == "*" || named.strip_prefix("W/").unwrap_or(named) == tag
}
