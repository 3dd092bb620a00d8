//! Letters: how wide a text is, and its outlines. The font is in the binary, so that a picture looks the same anywhere.

use std::sync::OnceLock;

use ttf_parser::{Face, GlyphId, OutlineBuilder};

/// The name of the font.
pub const NAME: &str = "Ubuntu";

/// Ubuntu Light, which has Latin, Greek and the signs that axes need.
static DATA: &[u8] = epaint_default_fonts::UBUNTU_LIGHT;

fn face() -> &'static Face<'static> {
    static FACE: OnceLock<Face<'static>> = OnceLock::new();
    FACE.get_or_init(|| Face::parse(DATA, 0).expect("our own font is a font"))
}

/// Width of a text in a size, in pixels.
pub fn width(text: &str, size: f64) -> f64 {
    let units: f64 = glyphs(text).map(advance).sum();
    units * size / f64::from(face().units_per_em())
}

/// Gives the outlines of a text to `out`, the beginning of its baseline at the origin, y downwards.
pub fn outline(text: &str, size: f64, out: &mut dyn OutlineBuilder) {
    let scale = size / f64::from(face().units_per_em());
    let mut pen = 0.0;
    for glyph in glyphs(text) {
        let mut placed = Placed {
            scale: scale as f32,
            x: (pen * scale) as f32,
            out,
        };
        // A space has no outline.
        let _ = face().outline_glyph(glyph, &mut placed);
        pen += advance(glyph);
    }
}

/// A text cut so that it is at most `most` pixels wide, with three dots where something was cut off.
pub fn fitted(text: &str, size: f64, most: f64) -> String {
    if width(text, size) <= most {
        return text.to_owned();
    }
    let mut cut = text.to_owned();
    while cut.pop().is_some() {
        let shown = format!("{}…", cut.trim_end());
        if width(&shown, size) <= most {
            return shown;
        }
    }
    String::new()
}

fn glyphs(text: &str) -> impl Iterator<Item = GlyphId> + '_ {
    // Glyph 0 is a box: a character that the font does not have.
    text.chars()
        .map(|c| face().glyph_index(c).unwrap_or(GlyphId(0)))
}

fn advance(glyph: GlyphId) -> f64 {
    face().glyph_hor_advance(glyph).map_or(0.0, f64::from)
}

/// Moves and scales an outline.
struct Placed<'a> {
    scale: f32,
    x: f32,
    out: &'a mut dyn OutlineBuilder,
}

impl Placed<'_> {
    fn at(&self, x: f32, y: f32) -> (f32, f32) {
        (self.x + x * self.scale, -y * self.scale)
    }
}

impl OutlineBuilder for Placed<'_> {
    fn move_to(&mut self, x: f32, y: f32) {
        let (x, y) = self.at(x, y);
        self.out.move_to(x, y);
    }

    fn line_to(&mut self, x: f32, y: f32) {
        let (x, y) = self.at(x, y);
        self.out.line_to(x, y);
    }

    fn quad_to(&mut self, x1: f32, y1: f32, x: f32, y: f32) {
        let ((x1, y1), (x, y)) = (self.at(x1, y1), self.at(x, y));
        self.out.quad_to(x1, y1, x, y);
    }

    fn curve_to(&mut self, x1: f32, y1: f32, x2: f32, y2: f32, x: f32, y: f32) {
        let (one, two, end) = (self.at(x1, y1), self.at(x2, y2), self.at(x, y));
        self.out.curve_to(one.0, one.1, two.0, two.1, end.0, end.1);
    }

    fn close(&mut self) {
        self.out.close();
    }
}
