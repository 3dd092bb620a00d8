//! Where everything in a chart goes. **Pure.**
//!
//! Each curve and each level is named at the right, at the height where it ends, in its colour and with its last value;
//! names that would lie on each other are moved apart, and a thin line leads to each.

use super::drawing::{Anchor, Color, Drawing, Mark};
use super::ticks::{Ticks, apart};
use super::{Chart, Series, font};

const INK: Color = Color(0x22, 0x22, 0x22);
const GREY: Color = Color(0x66, 0x66, 0x66);
const GRID: Color = Color(0xe4, 0xe4, 0xe4);
const AXIS: Color = Color(0x88, 0x88, 0x88);

/// Colours of curves: each has a contrast of at least 4 to 1 on white, and neighbours differ in brightness or hue.
const COLORS: [Color; 8] = [
    Color(0x1f, 0x6f, 0xb4),
    Color(0xc8, 0x4b, 0x11),
    Color(0x1d, 0x80, 0x4a),
    Color(0x8e, 0x3f, 0xb0),
    Color(0x9a, 0x6b, 0x00),
    Color(0x00, 0x80, 0x8c),
    Color(0xc2, 0x18, 0x5b),
    Color(0x5d, 0x40, 0x37),
];

const TITLE: f64 = 19.0;
const SMALL: f64 = 13.0;
const TINY: f64 = 11.0;

const MARGIN: f64 = 24.0;
const TOP: f64 = 88.0;
const BOTTOM: f64 = 62.0;

/// Space between a tick's number and the axis.
const TICK_GAP: f64 = 8.0;
/// Space between the end of the plot and the names, where the thin lines are.
const LEADER: f64 = 26.0;
/// Height that a name takes.
const NAME_HEIGHT: f64 = 18.0;
/// Widest name.
const NAME_WIDTH: f64 = 300.0;
/// From a text's middle to its baseline, as a part of its size.
const BASELINE: f64 = 0.36;

/// Curves of at most so many points show each of them.
const DOTTED: usize = 40;

/// Numbers along the axes, about.
const X_TICKS: usize = 8;
const Y_TICKS: usize = 6;

/// The rectangle of the plot, and what its sides mean.
struct Plot {
    left: f64,
    right: f64,
    top: f64,
    bottom: f64,
    /// The values at the left and right sides.
    ends: (f64, f64),
    x: Ticks,
    y: Ticks,
    /// Whether equal distances upwards are equal ratios.
    log: bool,
}

impl Plot {
    fn x(&self, value: f64) -> f64 {
        let part = (value - self.ends.0) / (self.ends.1 - self.ends.0);
        self.left + part * (self.right - self.left)
    }

    fn y(&self, value: f64) -> f64 {
        let place = |value: f64| if self.log { value.ln() } else { value };
        let (low, high) = (place(self.y.low()), place(self.y.high()));
        let part = (place(value) - low) / (high - low);
        self.bottom - part * (self.bottom - self.top)
    }
}

/// A name at the right, and where what it names ends.
struct Label {
    text: String,
    color: Color,
    end: (f64, f64),
}

/// The picture of a chart.
pub fn draw(chart: &Chart) -> Drawing {
    let chart = &drawable(chart);
    let plot = plot(chart);
    let mut marks = frame(chart, &plot);
    for series in chart.series.iter().enumerate() {
        band(&mut marks, &plot, series);
    }
    moments(&mut marks, &plot, chart);
    for level in &chart.levels {
        let y = plot.y(level.y);
        marks.push(Mark::Line {
            points: vec![(plot.left, y), (plot.right, y)],
            color: GREY,
            width: 1.5,
            dash: Some((6.0, 4.0)),
        });
    }
    for series in chart.series.iter().enumerate() {
        curve(&mut marks, &plot, series);
    }
    let labels = names(chart, &plot.y).into_iter();
    let labels = labels.map(|(text, color, (x, y))| Label {
        text,
        color,
        end: (x.map_or(plot.right, |x| plot.x(x)), plot.y(y)),
    });
    name_ends(&mut marks, &plot, labels.collect());
    let mut all = chart.series.iter();
    if all.all(|s| finite(&s.points).next().is_none()) {
        let middle = (
            (plot.left + plot.right) / 2.0,
            (plot.top + plot.bottom) / 2.0,
        );
        marks.push(text("no values", middle, SMALL, Anchor::Middle, GREY));
    }
    Drawing {
        width: Chart::WIDTH,
        height: Chart::HEIGHT,
        marks,
    }
}

/// The chart without what its axes cannot show: there, curves have gaps.
fn drawable(chart: &Chart) -> Chart {
    let mut chart = chart.clone();
    let shown = |y: f64| y.is_finite() && (!chart.log || y > 0.0);
    for series in &mut chart.series {
        let unseen = series.points.iter_mut().filter(|(_, y)| !shown(*y));
        unseen.for_each(|(_, y)| *y = f64::NAN);
        series
            .band
            .retain(|(x, low, high)| x.is_finite() && shown(*low) && shown(*high));
    }
    chart.levels.retain(|level| shown(level.y));
    chart
}

/// The rectangle of the plot and its axes.
fn plot(chart: &Chart) -> Plot {
    let (width, height) = (f64::from(Chart::WIDTH), f64::from(Chart::HEIGHT));
    let points = || chart.series.iter().flat_map(|s| finite(&s.points));
    let bands = chart.series.iter().flat_map(|s| &s.band);
    let bands = bands.flat_map(|(_, low, high)| [*low, *high]);
    let levels = chart.levels.iter().map(|level| level.y);
    let ends = range(points().map(|(x, _)| x));
    let bounds = range(points().map(|(_, y)| y).chain(levels).chain(bands));
    let log = chart.log && bounds.0 > 0.0;
    let y = match log {
        true => Ticks::logarithmic(bounds.0, bounds.1, Y_TICKS),
        false => Ticks::around(bounds.0, bounds.1, Y_TICKS),
    };
    let names = names(chart, &y);
    let widest = |texts: &mut dyn Iterator<Item = String>| {
        texts
            .map(|text| font::width(&text, SMALL))
            .fold(0.0, f64::max)
    };
    let numbers = widest(&mut y.values.iter().map(|v| y.label(*v)));
    let named = widest(&mut names.iter().map(|(text, ..)| text.clone()));
    Plot {
        left: MARGIN + numbers + TICK_GAP,
        right: match names.is_empty() {
            true => width - MARGIN,
            false => width - MARGIN - named - LEADER,
        },
        top: TOP,
        bottom: height - BOTTOM,
        ends: apart(ends.0, ends.1),
        x: Ticks::within(ends.0, ends.1, X_TICKS),
        y,
        log,
    }
}

/// The smallest and the largest of some values; 0 and 1 if there are none.
fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let bounds = values.fold(None, |bounds: Option<(f64, f64)>, v| match bounds {
        None => Some((v, v)),
        Some((low, high)) => Some((low.min(v), high.max(v))),
    });
    bounds.unwrap_or((0.0, 1.0))
}

fn finite(points: &[(f64, f64)]) -> impl DoubleEndedIterator<Item = (f64, f64)> + '_ {
    let points = points.iter().copied();
    points.filter(|(x, y)| x.is_finite() && y.is_finite())
}

/// What is written at the right: text, colour, and where it belongs; a level has no last x.
fn names(chart: &Chart, ticks: &Ticks) -> Vec<(String, Color, (Option<f64>, f64))> {
    let named = |name: &str, y: f64| {
        let value = ticks.exact(y);
        let room = NAME_WIDTH - font::width(&format!(" {value}"), SMALL);
        format!("{} {value}", font::fitted(name, SMALL, room))
    };
    let curves = chart.series.iter().enumerate();
    let curves = curves.filter_map(|(index, series)| {
        let (x, y) = finite(&series.points).next_back()?;
        Some((named(&series.name, y), color(index, series), (Some(x), y)))
    });
    let levels = chart.levels.iter();
    let levels = levels.map(|level| (named(&level.name, level.y), GREY, (None, level.y)));
    curves.chain(levels).collect()
}

/// Title, grid, axes and what they mean.
fn frame(chart: &Chart, plot: &Plot) -> Vec<Mark> {
    let (width, height) = (f64::from(Chart::WIDTH), f64::from(Chart::HEIGHT));
    let most = width - 2.0 * MARGIN;
    let title = font::fitted(&chart.title, TITLE, most);
    let y_label = font::fitted(&chart.y_label, SMALL, most);
    let mut marks = vec![
        text(&title, (MARGIN, 40.0), TITLE, Anchor::Start, INK),
        text(&y_label, (MARGIN, 68.0), SMALL, Anchor::Start, GREY),
    ];
    let line = |points: [(f64, f64); 2], color| Mark::Line {
        points: points.to_vec(),
        color,
        width: 1.0,
        dash: None,
    };
    for &value in &plot.y.values {
        let y = plot.y(value);
        marks.push(line([(plot.left, y), (plot.right, y)], GRID));
        let at = (plot.left - TICK_GAP, y + SMALL * BASELINE);
        marks.push(text(&plot.y.label(value), at, SMALL, Anchor::End, GREY));
    }
    let below = plot.bottom + 20.0;
    for &value in &plot.x.values {
        let x = plot.x(value);
        marks.push(line([(x, plot.bottom), (x, plot.bottom + 5.0)], AXIS));
        let label = plot.x.label(value);
        marks.push(text(&label, (x, below), SMALL, Anchor::Middle, GREY));
    }
    marks.push(line(
        [(plot.left, plot.bottom), (plot.right, plot.bottom)],
        AXIS,
    ));
    let middle = ((plot.left + plot.right) / 2.0, height - 18.0);
    let x_label = font::fitted(&chart.x_label, SMALL, most);
    marks.push(text(&x_label, middle, SMALL, Anchor::Middle, GREY));
    marks
}

fn color(index: usize, series: &Series) -> Color {
    COLORS[series.color.unwrap_or(index) % COLORS.len()]
}

/// Where the values of a curve lie, behind everything else.
fn band(marks: &mut Vec<Mark>, plot: &Plot, (index, series): (usize, &Series)) {
    let edge = |(x, y): (f64, f64)| (plot.x(x), plot.y(y));
    let upper = series.band.iter().map(|(x, _, high)| edge((*x, *high)));
    let lower = series.band.iter().rev().map(|(x, low, _)| edge((*x, *low)));
    if series.band.len() > 1 {
        marks.push(Mark::Area {
            points: upper.chain(lower).collect(),
            color: color(index, series),
            opacity: 0.2,
        });
    }
}

/// Where something happened: a thin line each, with its name where that does not run into the name before.
fn moments(marks: &mut Vec<Mark>, plot: &Plot, chart: &Chart) {
    let inside = |x: f64| x >= plot.ends.0 && x <= plot.ends.1;
    let mut moments: Vec<_> = chart.moments.iter().filter(|m| inside(m.x)).collect();
    moments.sort_by(|a, b| a.x.total_cmp(&b.x));
    let mut free = plot.left;
    for moment in moments {
        let x = plot.x(moment.x);
        marks.push(Mark::Line {
            points: vec![(x, plot.top), (x, plot.bottom)],
            color: AXIS,
            width: 1.0,
            dash: Some((2.0, 3.0)),
        });
        let width = font::width(&moment.name, TINY);
        if x >= free && x + width + 4.0 <= plot.right {
            let at = (x + 4.0, plot.top + TINY);
            marks.push(text(&moment.name, at, TINY, Anchor::Start, GREY));
            free = x + width + 8.0;
        }
    }
}

/// A curve: a line for each stretch without a gap, and its points where there are few.
fn curve(marks: &mut Vec<Mark>, plot: &Plot, (index, series): (usize, &Series)) {
    let (color, points) = (color(index, series), &series.points[..]);
    // Also the second round of the same colours.
    let dashed = series.dashed || (series.color.is_none() && index >= COLORS.len());
    let dash = dashed.then_some((7.0, 4.0));
    let is_point = |(x, y): &(f64, f64)| x.is_finite() && y.is_finite();
    for stretch in points.split(|point| !is_point(point)) {
        if stretch.len() > 1 {
            marks.push(Mark::Line {
                points: stretch
                    .iter()
                    .map(|&(x, y)| (plot.x(x), plot.y(y)))
                    .collect(),
                color,
                width: 2.0,
                dash,
            });
        }
    }
    let few = points.len() <= DOTTED;
    let last = finite(points).next_back();
    for (x, y) in finite(points) {
        let is_last = Some((x, y)) == last;
        if few || is_last {
            marks.push(Mark::Dot {
                at: (plot.x(x), plot.y(y)),
                radius: if is_last { 3.5 } else { 2.5 },
                color,
            });
        }
    }
}

/// Writes the names, moved apart, each with a thin line to what it names.
fn name_ends(marks: &mut Vec<Mark>, plot: &Plot, mut labels: Vec<Label>) {
    labels.sort_by(|a, b| a.end.1.total_cmp(&b.end.1));
    let wanted: Vec<f64> = labels.iter().map(|label| label.end.1).collect();
    let places = spread(&wanted, NAME_HEIGHT, plot.top, plot.bottom);
    for (label, y) in labels.into_iter().zip(places) {
        let start = (label.end.0 + 6.0, label.end.1);
        let middle = (plot.right + 8.0, label.end.1);
        let mut points = vec![
            (plot.right + LEADER - 10.0, y),
            (plot.right + LEADER - 4.0, y),
        ];
        // A straight piece to the edge of the plot, and a slope to the name.
        points.splice(0..0, [start, middle].into_iter().filter(|p| p.0 >= start.0));
        marks.push(Mark::Line {
            points,
            color: lighter(label.color),
            width: 1.0,
            dash: None,
        });
        let at = (plot.right + LEADER, y + SMALL * BASELINE);
        marks.push(text(&label.text, at, SMALL, Anchor::Start, label.color));
    }
}

/// Half way to white.
fn lighter(Color(red, green, blue): Color) -> Color {
    let half = |c: u8| c / 2 + 128;
    Color(half(red), half(green), half(blue))
}

/// Places as near to the wanted ones as can be (least squares) that are `gap` apart and between `low` and `high`, or
/// beyond `high` if there are too many. `wanted` ascends; so do the places.
///
/// With i · gap taken off the i-th place, this is isotonic regression, by pooling neighbours that are out of order.
pub(super) fn spread(wanted: &[f64], gap: f64, low: f64, high: f64) -> Vec<f64> {
    let mut pools: Vec<(f64, usize)> = Vec::new(); // sum and number
    for (i, place) in wanted.iter().enumerate() {
        let mut pool = (place - i as f64 * gap, 1);
        while let Some(&(sum, count)) = pools.last() {
            if sum / count as f64 <= pool.0 / pool.1 as f64 {
                break;
            }
            pool = (sum + pool.0, count + pool.1);
            pools.pop();
        }
        pools.push(pool);
    }
    let highest = (high - wanted.len().saturating_sub(1) as f64 * gap).max(low);
    let means = pools.iter().flat_map(|&(sum, count)| {
        std::iter::repeat_n((sum / count as f64).clamp(low, highest), count)
    });
    means
        .enumerate()
        .map(|(i, mean)| mean + i as f64 * gap)
        .collect()
}

fn text(text: &str, at: (f64, f64), size: f64, anchor: Anchor, color: Color) -> Mark {
    Mark::Text {
        text: text.to_owned(),
        at,
        size,
        anchor,
        color,
    }
}
