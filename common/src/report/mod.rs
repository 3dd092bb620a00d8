//! Pictures for reports: curves over steps, as SVG and as PNG. **Pure:** the same chart gives the same bytes.
//!
//! In reading order: this file (what a chart says), `ticks` (round numbers), `layout` (where everything goes), `drawing`
//! (the few kinds of marks that a picture is made of), `font` (letters), and the two ways out: `svg` and `png`.

mod drawing;
mod font;
mod layout;
mod png;
mod svg;
mod ticks;

pub use ticks::Ticks;

/// Curves in one picture, with their axes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Chart {
    /// What the picture shows.
    pub title: String,
    /// What the horizontal axis counts.
    pub x_label: String,
    /// What the vertical axis measures.
    pub y_label: String,
    /// The curves. Colours tell up to eight of them apart; more are dashed as well.
    pub series: Vec<Series>,
    /// Horizontal lines to compare the curves with.
    pub levels: Vec<Level>,
    /// Places on the horizontal axis where something happened.
    pub moments: Vec<Moment>,
    /// Whether the vertical axis is logarithmic. Values that are not positive leave a gap then.
    pub log: bool,
}

/// A curve.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Series {
    /// What it is called.
    pub name: String,
    /// Its points, from left to right. A value that is not finite leaves a gap.
    pub points: Vec<(f64, f64)>,
    /// Where its values lie that the points are means of: x, lowest, highest; from left to right.
    pub band: Vec<(f64, f64, f64)>,
    /// The colour of the curve with this place among the curves; its own if absent.
    pub color: Option<usize>,
    /// Whether it is dashed.
    pub dashed: bool,
}

/// A value that curves are compared with.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Level {
    /// What it is called.
    pub name: String,
    /// The value.
    pub y: f64,
}

/// Something that happened at a place on the horizontal axis.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Moment {
    /// What it was, in a word or two. Left out where there is no room.
    pub name: String,
    /// Where.
    pub x: f64,
}

/// Charts below each other, as one SVG document.
pub fn stacked_svg(charts: &[Chart]) -> String {
    svg::write(&stacked(charts))
}

/// Charts below each other, as one PNG file of `scale` times the size of each, as [`Chart::png`] has it.
pub fn stacked_png(charts: &[Chart], scale: u32) -> Vec<u8> {
    png::write(&stacked(charts), scale.clamp(1, 8))
}

fn stacked(charts: &[Chart]) -> drawing::Drawing {
    let mut whole = drawing::Drawing {
        width: Chart::WIDTH,
        height: Chart::HEIGHT * charts.len().max(1) as u32,
        marks: Vec::new(),
    };
    for (place, chart) in charts.iter().enumerate() {
        let above = f64::from(Chart::HEIGHT) * place as f64;
        let marks = layout::draw(chart).marks.into_iter();
        whole.marks.extend(marks.map(|mark| mark.lower(above)));
    }
    whole
}

impl Chart {
    /// Width of the picture, in pixels of a PNG of scale 1.
    pub const WIDTH: u32 = 960;
    /// Its height.
    pub const HEIGHT: u32 = 540;

    /// The picture as an SVG document.
    pub fn svg(&self) -> String {
        svg::write(&layout::draw(self))
    }

    /// The picture as a PNG file of `scale` times [`WIDTH`](Self::WIDTH) by `scale` times [`HEIGHT`](Self::HEIGHT)
    /// pixels. `scale` is kept within 1 to 8.
    pub fn png(&self, scale: u32) -> Vec<u8> {
        png::write(&layout::draw(self), scale.clamp(1, 8))
    }
}

#[cfg(test)]
mod tests;
