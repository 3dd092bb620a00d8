//! Jinja as chat templates use it: the environment that `transformers` renders them in, rebuilt on `minijinja`.
//! **Pure.**
//!
//! Python's methods of strings and maps come from `minijinja-contrib`. What `transformers` adds is added here:
//! `raise_exception`, `strftime_now`, a `tojson` that does not escape HTML, and `{% generation %}` blocks.

use std::io;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Kwargs;
use minijinja::{Environment, Error, ErrorKind, Value};
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

/// What templates that ask for the date get, as year, month and day. It never changes, so that the same conversation
/// gives the same tokens on any day. It is the date that Llama 3's template takes where there is no clock.
pub const TODAY: (u32, u32, u32) = (2024, 7, 26);

/// The weekday of [`TODAY`].
const WEEKDAY: &str = "Friday";

/// The day of the year of [`TODAY`].
const DAY_OF_YEAR: u32 = 208;

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

/// What a template gave to `raise_exception`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Raised(pub String);

/// An environment with one template, under the name `name`.
///
/// # Errors
/// A template that does not parse.
pub(super) fn environment(name: &'static str, source: &str) -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build()?;
    environment.set_syntax(syntax);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment.add_filter("tojson", tojson);
    environment.add_template_owned(name, without_generation_tags(source))?;
    Ok(environment)
}

fn raise_exception(message: String) -> Result<Value, Error> {
    let error = Error::new(ErrorKind::InvalidOperation, message.clone());
    Err(error.with_source(Raised(message)))
}

/// [`TODAY`] at midnight, in the format of C's `strftime`.
fn strftime_now(format: &str) -> Result<String, Error> {
    let (year, month, day) = TODAY;
    let month_name = MONTHS[month as usize - 1];
    let mut text = String::new();
    let mut rest = format.chars();
    while let Some(c) = rest.next() {
        if c != '%' {
            text.push(c);
            continue;
        }
        let (plain, field) = match rest.next() {
            Some('-') => (true, rest.next()),
            field => (false, field),
        };
        let number = |n: u32, width: usize| match plain {
            true => n.to_string(),
            false => format!("{n:0width$}"),
        };
        text += &match field {
            Some('Y') => year.to_string(),
            Some('y') => number(year % 100, 2),
            Some('m') => number(month, 2),
            Some('d') => number(day, 2),
            Some('j') => number(DAY_OF_YEAR, 3),
            Some('B') => month_name.into(),
            Some('b') => month_name[..3].into(),
            Some('A') => WEEKDAY.into(),
            Some('a') => WEEKDAY[..3].into(),
            Some('H' | 'M' | 'S') => number(0, 2),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => "00:00:00".into(),
            Some('%') => "%".into(),
            other => {
                let other = other.map(String::from).unwrap_or_default();
                return Err(Error::new(
                    ErrorKind::InvalidOperation,
                    format!("`strftime_now` does not know `%{other}`"),
                ));
            }
        };
    }
    Ok(text)
}

/// JSON as Python's `json.dumps` writes it without `ensure_ascii`.
fn tojson(value: &Value, options: Kwargs) -> Result<String, Error> {
    // Characters are never escaped, and maps keep their order, which are the defaults of `transformers`.
    let _: Option<bool> = options.get("ensure_ascii")?;
    let indent: Option<usize> = options.get("indent")?;
    options.assert_all_used()?;
    let mut out = Vec::new();
    let written = match indent {
        Some(indent) => {
            let indent = " ".repeat(indent.min(MAX_INDENT));
            let pretty = PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut Serializer::with_formatter(&mut out, pretty))
        }
        None => value.serialize(&mut Serializer::with_formatter(&mut out, PythonSpacing)),
    };
    written.map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    String::from_utf8(out)
        .map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))
}

/// Widest step of `tojson(indent=…)`, in spaces.
const MAX_INDENT: usize = 16;

/// One line, with a space after commas and colons.
struct PythonSpacing;

impl Formatter for PythonSpacing {
    fn begin_array_value<W: io::Write + ?Sized>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> io::Result<()> {
        w.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: io::Write + ?Sized>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> io::Result<()> {
        w.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_value<W: io::Write + ?Sized>(&mut self, w: &mut W) -> io::Result<()> {
        w.write_all(b": ")
    }
}

/// `{% generation %}` and its end mark what the assistant says, for masks that `transformers` makes. They render
/// nothing themselves; here they become a condition that always holds, with the same control of whitespace.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some((before, tag)) = rest.split_once("{%") {
        let Some((inner, after)) = tag.split_once("%}") else {
            break;
        };
        let word = inner.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        let instead = match word {
            "generation" => "if true",
            "endgeneration" => "endif",
            other => other,
        };
        out += before;
        out += "{%";
        out += &inner.replacen(word, instead, usize::from(word != instead));
        out += "%}";
        rest = after;
    }
    out + rest
}
