//! A drawing as an SVG document. **Pure.**

use std::fmt::Write;

use super::drawing::{Anchor, Color, Drawing, Mark};
use super::font;

/// The document. Texts stay texts.
pub fn write(drawing: &Drawing) -> String {
    let (width, height) = (drawing.width, drawing.height);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         viewBox=\"0 0 {width} {height}\" font-family=\"'{}', Verdana, sans-serif\">\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"#ffffff\"/>\n",
        font::NAME
    );
    for mark in &drawing.marks {
        mark_to(&mut out, mark).expect("a string takes everything");
    }
    out + "</svg>\n"
}

fn mark_to(out: &mut String, mark: &Mark) -> std::fmt::Result {
    match mark {
        Mark::Line {
            points,
            color,
            width,
            dash,
        } => {
            write!(
                out,
                "<polyline points=\"{}\" fill=\"none\" stroke=\"{}\" stroke-width=\"{}\" stroke-linejoin=\"round\"",
                places(points),
                hex(*color),
                short(*width)
            )?;
            if let Some((dash, gap)) = dash {
                write!(
                    out,
                    " stroke-dasharray=\"{} {}\"",
                    short(*dash),
                    short(*gap)
                )?;
            }
            writeln!(out, "/>")
        }
        Mark::Area {
            points,
            color,
            opacity,
        } => writeln!(
            out,
            "<polygon points=\"{}\" fill=\"{}\" fill-opacity=\"{opacity}\"/>",
            places(points),
            hex(*color)
        ),
        Mark::Dot { at, radius, color } => writeln!(
            out,
            "<circle cx=\"{}\" cy=\"{}\" r=\"{}\" fill=\"{}\"/>",
            short(at.0),
            short(at.1),
            short(*radius),
            hex(*color)
        ),
        Mark::Text {
            text,
            at,
            size,
            anchor,
            color,
        } => writeln!(
            out,
            "<text x=\"{}\" y=\"{}\" font-size=\"{}\" text-anchor=\"{}\" fill=\"{}\">{}</text>",
            short(at.0),
            short(at.1),
            short(*size),
            match anchor {
                Anchor::Start => "start",
                Anchor::Middle => "middle",
                Anchor::End => "end",
            },
            hex(*color),
            escaped(text)
        ),
    }
}

fn places(points: &[(f64, f64)]) -> String {
    let places = points.iter();
    let places: Vec<_> = places
        .map(|(x, y)| format!("{},{}", short(*x), short(*y)))
        .collect();
    places.join(" ")
}

/// A tenth of a pixel is enough.
fn short(value: f64) -> String {
    let text = format!("{value:.1}");
    match text.strip_suffix(".0") {
        Some("-0") => "0".into(),
        Some(whole) => whole.into(),
        None => text,
    }
}

fn hex(Color(red, green, blue): Color) -> String {
    format!("#{red:02x}{green:02x}{blue:02x}")
}

/// Text between tags. Control characters, which XML does not have, become U+FFFD.
fn escaped(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            c if c.is_control() => out.push(char::REPLACEMENT_CHARACTER),
            c => out.push(c),
        }
    }
    out
}
