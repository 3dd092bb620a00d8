//! Curves as letters: each cell of the terminal is a Braille letter with two columns and four rows of dots.

use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::style::Style;

/// The bit of each dot of a Braille letter: left and right column, from the top.
const DOTS: [[u8; 4]; 2] = [[0x01, 0x02, 0x04, 0x40], [0x08, 0x10, 0x20, 0x80]];
/// The Braille letter without dots.
const BLANK: u32 = 0x2800;

/// A point of a curve; it stands for the steps since the point before.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// Where it stands.
    pub x: f64,
    /// The mean.
    pub y: Option<f64>,
    /// The lowest and the highest value, where it stands for several steps.
    pub range: Option<(f64, f64)>,
}

/// The piece of the plane that is seen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Window {
    /// From left to right.
    pub x: (f64, f64),
    /// From the lower to the upper end.
    pub y: (f64, f64),
    /// Whether heights are logarithms.
    pub logarithmic: bool,
}

impl Window {
    /// How far up a value is: 0 at the lower end, 1 at the upper.
    pub fn height(&self, y: f64) -> f64 {
        let scale = |v: f64| {
            if self.logarithmic {
                v.max(f64::MIN_POSITIVE).ln()
            } else {
                v
            }
        };
        let (low, high) = (scale(self.y.0), scale(self.y.1));
        part(scale(y), low, high)
    }

    /// How far to the right a place is: 0 at the left end, 1 at the right.
    pub fn across(&self, x: f64) -> f64 {
        part(x, self.x.0, self.x.1)
    }
}

fn part(value: f64, low: f64, high: f64) -> f64 {
    match high > low {
        true => (value - low) / (high - low),
        false => 0.5,
    }
}

/// A curve and the band around it, as dots.
pub struct Raster {
    columns: usize,
    rows: usize,
    line: Vec<u8>,
    band: Vec<u8>,
}

impl Raster {
    /// An empty one of so many cells.
    pub fn new(width: u16, height: u16) -> Self {
        let (columns, rows) = (usize::from(width), usize::from(height));
        Self {
            columns,
            rows,
            line: vec![0; columns * rows],
            band: vec![0; columns * rows],
        }
    }

    /// Draws a curve whose points stand from left to right.
    pub fn curve(&mut self, points: &[Point], window: &Window) {
        let mut before = None;
        for dot in 0..2 * self.columns {
            let place = (dot as f64 + 0.5) / (2 * self.columns) as f64;
            let x = window.x.0 + place * (window.x.1 - window.x.0);
            let next = points.partition_point(|point| point.x < x);
            let nearest = next.min(points.len().saturating_sub(1));
            if let Some((low, high)) = points.get(nearest).and_then(|point| point.range) {
                let (low, high) = (self.row(low, window), self.row(high, window));
                Self::fill(&mut self.band, self.columns, self.rows, dot, (high, low));
            }
            let row = between(points, next, x).map(|y| self.row(y, window));
            if let Some(row) = row {
                // The curve has no holes where it is steep.
                let ends = match before {
                    Some(before) if before < row => (before + 1, row),
                    Some(before) if before > row => (row, before - 1),
                    _ => (row, row),
                };
                Self::fill(&mut self.line, self.columns, self.rows, dot, ends);
            }
            before = row;
        }
    }

    /// Puts the curve into the buffer, over the band.
    pub fn render(&self, area: Rect, buffer: &mut Buffer, line: Style, band: Style) {
        for (row, y) in (area.top()..area.bottom()).enumerate().take(self.rows) {
            for (column, x) in (area.left()..area.right()).enumerate().take(self.columns) {
                let at = row * self.columns + column;
                let (bits, style) = match (self.line[at], self.band[at]) {
                    (0, 0) => continue,
                    (0, bits) => (bits, band),
                    (bits, _) => (bits, line),
                };
                let letter = char::from_u32(BLANK + u32::from(bits)).unwrap_or('.');
                if let Some(cell) = buffer.cell_mut((x, y)) {
                    cell.set_char(letter).set_style(style);
                }
            }
        }
    }

    /// The row of dots of a value, from the top.
    fn row(&self, y: f64, window: &Window) -> i64 {
        let last = (4 * self.rows).saturating_sub(1) as f64;
        ((1.0 - window.height(y)) * last).round().clamp(0.0, last) as i64
    }

    fn fill(bits: &mut [u8], columns: usize, rows: usize, dot: usize, (top, bottom): (i64, i64)) {
        for row in top.max(0)..=bottom.min(4 * rows as i64 - 1) {
            let row = row as usize;
            bits[row / 4 * columns + dot / 2] |= DOTS[dot % 2][row % 4];
        }
    }
}

/// The curve's value at a place: on the straight line between its neighbours. `next` is the first point at or behind it.
fn between(points: &[Point], next: usize, x: f64) -> Option<f64> {
    match next {
        // Before the first point there is nothing but that point.
        0 => points.first()?.y,
        _ if next >= points.len() => points.last()?.y,
        _ => {
            let (left, right) = (&points[next - 1], &points[next]);
            let (from, to) = (left.y?, right.y?);
            let way = (x - left.x) / (right.x - left.x).max(f64::MIN_POSITIVE);
            Some(from + (to - from) * way)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(points: &[Point], window: &Window, (width, height): (u16, u16)) -> Vec<String> {
        let mut raster = Raster::new(width, height);
        raster.curve(points, window);
        let area = Rect::new(0, 0, width, height);
        let mut buffer = Buffer::empty(area);
        raster.render(area, &mut buffer, Style::new(), Style::new());
        let row = |y| (0..width).map(|x| buffer[(x, y)].symbol()).collect();
        (0..height).map(row).collect()
    }

    fn point(x: f64, y: f64) -> Point {
        Point {
            x,
            y: Some(y),
            range: None,
        }
    }

    const UNIT: Window = Window {
        x: (0.0, 1.0),
        y: (0.0, 1.0),
        logarithmic: false,
    };

    #[test]
    fn a_line_climbs_from_corner_to_corner_and_has_no_holes() {
        let line = [point(0.0, 0.0), point(1.0, 1.0)];
        assert_eq!(drawn(&line, &UNIT, (4, 2)), ["  ⡠⠊", "⡠⠊  "]);
        let jump = [
            point(0.0, 0.0),
            point(0.49, 0.0),
            point(0.51, 1.0),
            point(1.0, 1.0),
        ];
        let steep = drawn(&jump, &UNIT, (2, 2));
        assert_eq!(steep, [" ⡏", "⣀⠇"]);
    }

    #[test]
    fn a_band_is_filled_and_a_gap_is_left() {
        let band = [Point {
            x: 1.0,
            y: None,
            range: Some((0.0, 1.0)),
        }];
        assert_eq!(drawn(&band, &UNIT, (2, 1)), ["⣿⣿"]);
        let gap = [
            point(0.0, 0.5),
            Point {
                x: 0.5,
                y: None,
                range: None,
            },
            point(1.0, 0.5),
        ];
        assert_eq!(drawn(&gap, &UNIT, (2, 1)), ["  "]);
    }

    #[test]
    fn heights_are_logarithms_where_that_is_asked_for() {
        let window = Window {
            y: (1.0, 100.0),
            logarithmic: true,
            ..UNIT
        };
        assert!((window.height(10.0) - 0.5).abs() < 1e-12);
        assert!(window.height(0.0).is_finite());
    }

    #[test]
    fn nothing_panics_without_points_or_without_room() {
        for size in [(0, 0), (1, 1), (3, 0), (0, 3)] {
            drawn(&[], &UNIT, size);
            drawn(&[point(5.0, f64::NAN)], &UNIT, size);
            drawn(&[point(0.0, 9.0), point(0.0, -9.0)], &UNIT, size);
        }
    }
}
