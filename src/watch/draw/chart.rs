//! The loss: training as a line with the lowest and highest values around it, validations as signs.

use cohort_common::api::{Band, EvalEvent, History};
use cohort_common::report::Ticks;
use cohort_common::spec::human_count;
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::text::{Line, Span};

use super::raster::{Point, Raster, Window};
use super::{Role, Theme, titled};
use crate::output::duration;
use crate::step_line::clip;
use crate::watch::state::{Axis, Panel, State};

/// Losses whose highest is so many times the lowest have powers of ten beside them on a logarithmic scale.
const DECADES_FROM: f64 = 20.0;

/// A validation in the chart.
struct Mark {
    x: f64,
    y: f64,
    base: bool,
}

/// Draws the chart.
pub fn draw(frame: &mut Frame, area: Rect, state: &State, theme: Theme) {
    let scale = if state.logarithmic { "log " } else { "" };
    let name = format!("{scale}loss");
    let chosen = state.panel == Panel::Charts;
    let inner = titled(frame, area, (&name, chosen), legend(state, theme), theme);
    let points = points(&state.history, &state.history.loss, state.axis);
    let marks = marks(state);
    let Some(window) = window(&points, &marks, state.logarithmic) else {
        let text = if state.run.is_some() {
            "no step yet"
        } else {
            ""
        };
        frame.render_widget(Line::styled(text, theme.style(Role::Faint)), inner);
        return;
    };
    let [upper, foot] = Layout::vertical([Constraint::Fill(1), Constraint::Length(1)]).areas(inner);
    let labels = labels(&window, upper.height);
    let widest = labels.iter().map(|(_, text)| text.chars().count()).max();
    let left = u16::try_from(widest.unwrap_or(0) + 1).unwrap_or(u16::MAX);
    let left = if left + 10 > inner.width { 0 } else { left };
    let [beside, plot] =
        Layout::horizontal([Constraint::Length(left), Constraint::Fill(1)]).areas(upper);
    for (height, text) in &labels {
        let row = row_of(*height, beside);
        let line = Line::styled(
            format!("{text:>0$}", usize::from(left).saturating_sub(1)),
            theme.style(Role::Faint),
        );
        frame.render_widget(
            line,
            Rect {
                y: row,
                height: beside.height.min(1),
                ..beside
            },
        );
    }
    put_baselines(frame, plot, state, &window, theme);
    let mut raster = Raster::new(plot.width, plot.height);
    raster.curve(&points, &window);
    let (line, band) = (theme.style(Role::Train), theme.style(Role::Band));
    raster.render(plot, frame.buffer_mut(), line, band);
    put_marks(frame, plot, &marks, &window, theme);
    let under = Rect {
        x: plot.x,
        width: plot.width,
        ..foot
    };
    below(frame, under, &window, state, theme);
}

fn legend(state: &State, theme: Theme) -> Line<'static> {
    let mut line = Line::from(vec![
        Span::styled("⠒⠒", theme.style(Role::Train)),
        Span::raw(" train"),
    ]);
    let evals = state.run.iter().flat_map(|run| &run.info.evals);
    let splits: Vec<&str> = evals.map(|eval| eval.split.as_str()).collect();
    for (split, role, words) in [
        ("validation", Role::Validation, " validation"),
        ("base_validation", Role::Base, " base validation"),
    ] {
        if splits.contains(&split) {
            line.push_span(Span::styled(
                format!("  {}", sign(role == Role::Base)),
                theme.style(role),
            ));
            line.push_span(words);
        }
    }
    if state.look.zoom > 0 {
        line.push_span(format!("  last 1/{}", 1u64 << state.look.zoom));
    }
    line
}

fn sign(base: bool) -> char {
    if base { '◇' } else { '◆' }
}

/// The points of a metric over what the axis counts.
pub fn points(history: &History, band: &Band, axis: Axis) -> Vec<Point> {
    let place = |i: usize| place(history, i, axis);
    let value = |list: &[Option<f32>], i: usize| list.get(i).copied().flatten().map(f64::from);
    let point = |i: usize| Point {
        x: place(i),
        y: value(&band.mean, i),
        range: value(&band.min, i).zip(value(&band.max, i)),
    };
    (0..history.step.len()).map(point).collect()
}

/// Where a point of the history stands. Time counts from the first point, in seconds.
fn place(history: &History, i: usize, axis: Axis) -> f64 {
    let at = |list: &[u64]| list.get(i).copied().unwrap_or_default();
    match axis {
        Axis::Step => at(&history.step) as f64,
        Axis::Tokens => at(&history.tokens) as f64,
        Axis::Time => {
            let first = history.time_ms.first().copied().unwrap_or_default();
            at(&history.time_ms).saturating_sub(first) as f64 / 1000.0
        }
    }
}

/// The validations of the steps that are seen.
fn marks(state: &State) -> Vec<Mark> {
    let history = &state.history;
    let evals = state.run.iter().flat_map(|run| &run.info.evals);
    let seen = |eval: &&EvalEvent| {
        let first = if state.look.zoom == 0 {
            0
        } else {
            history.step.first().copied().unwrap_or(0)
        };
        eval.step >= first && eval.loss.is_finite()
    };
    let mark = |eval: &EvalEvent| {
        let next = history.step.partition_point(|step| *step < eval.step);
        let last = history.step.len().checked_sub(1);
        let x = match state.axis {
            Axis::Step => eval.step as f64,
            _ if eval.step == 0 => 0.0,
            _ => last.map_or(0.0, |last| place(history, next.min(last), state.axis)),
        };
        Mark {
            x,
            y: eval.loss,
            base: eval.split == "base_validation",
        }
    };
    evals.filter(seen).map(mark).collect()
}

/// The piece of the plane that has all points and marks; `None` if there are none.
fn window(points: &[Point], marks: &[Mark], logarithmic: bool) -> Option<Window> {
    let ys = points.iter().flat_map(|point| {
        let range = point.range.map(|(low, high)| [Some(low), Some(high)]);
        let range = range.into_iter().flatten();
        range.chain([point.y]).flatten()
    });
    let ys = ys.chain(marks.iter().map(|mark| mark.y));
    let ys: Vec<f64> = ys
        .filter(|y| y.is_finite() && (!logarithmic || *y > 0.0))
        .collect();
    let xs = points.iter().map(|point| point.x);
    let xs: Vec<f64> = xs.chain(marks.iter().map(|mark| mark.x)).collect();
    let ends = |values: &[f64]| {
        let low = values.iter().copied().reduce(f64::min)?;
        Some((low, values.iter().copied().reduce(f64::max)?))
    };
    let (low, high) = ends(&ys)?;
    let margin = if high > low {
        0.0
    } else {
        (low.abs() / 10.0).max(1e-6)
    };
    Some(Window {
        x: ends(&xs)?,
        y: (low - margin, high + margin),
        logarithmic,
    })
}

/// Round numbers along the left side, with how far up they stand.
fn labels(window: &Window, rows: u16) -> Vec<(f64, String)> {
    let (low, high) = window.y;
    let wanted = usize::from(rows / 2).clamp(1, 6);
    if window.logarithmic && low > 0.0 && high / low > DECADES_FROM {
        let decades = low.log10().ceil() as i32..=high.log10().floor() as i32;
        return decades
            .map(|power| 10f64.powi(power))
            .map(|value| (window.height(value), format!("{value}")))
            .collect();
    }
    let ticks = Ticks::within(low, high, wanted);
    let label = |value: &f64| (window.height(*value), ticks.label(*value));
    ticks.values.iter().map(label).collect()
}

fn row_of(height: f64, area: Rect) -> u16 {
    let last = f64::from(area.height.saturating_sub(1));
    area.y + ((1.0 - height) * last).round().clamp(0.0, last) as u16
}

/// What counting alone would lose, as dashed lines with their names, where they are within the picture.
fn put_baselines(frame: &mut Frame, area: Rect, state: &State, window: &Window, theme: Theme) {
    let known = state.run.as_ref().and_then(|run| run.facts.baselines);
    let Some(known) = known.filter(|_| !area.is_empty()) else {
        return;
    };
    let ngram = known.ngram.map(|n| (n.loss, format!("{}-gram", n.order)));
    let levels = [
        Some((known.uniform, "uniform".to_owned())),
        known.unigram.map(|loss| (loss, "unigram".to_owned())),
        ngram,
    ];
    for (loss, name) in levels.into_iter().flatten() {
        let height = window.height(loss);
        if !(0.0..=1.0).contains(&height) {
            continue;
        }
        let width = usize::from(area.width);
        let name = clip(&format!(" {name}"), width);
        let dashes = "╌".repeat(width.saturating_sub(name.chars().count()));
        let line = Line::styled(format!("{dashes}{name}"), theme.style(Role::Faint));
        let row = row_of(height, area);
        let place = Rect {
            y: row,
            height: 1,
            ..area
        };
        frame.render_widget(line, place);
    }
}

fn put_marks(frame: &mut Frame, area: Rect, marks: &[Mark], window: &Window, theme: Theme) {
    if area.is_empty() {
        return;
    }
    for mark in marks {
        let last = f64::from(area.width - 1);
        let column = (window.across(mark.x) * last).round().clamp(0.0, last) as u16;
        let role = if mark.base {
            Role::Base
        } else {
            Role::Validation
        };
        let place = (area.x + column, row_of(window.height(mark.y), area));
        if let Some(cell) = frame.buffer_mut().cell_mut(place) {
            cell.set_char(sign(mark.base)).set_style(theme.style(role));
        }
    }
}

/// Where the horizontal axis begins and ends, and what it counts.
fn below(frame: &mut Frame, area: Rect, window: &Window, state: &State, theme: Theme) {
    let word = match state.axis {
        Axis::Step => "step",
        Axis::Tokens => "tokens",
        Axis::Time => "time",
    };
    let text = |x: f64| match state.axis {
        Axis::Step => format!("{x:.0}"),
        Axis::Tokens => human_count(x as u64),
        Axis::Time => duration(x),
    };
    let (left, right) = (text(window.x.0), text(window.x.1));
    let width = usize::from(area.width);
    let used = left.chars().count() + right.chars().count();
    let middle = match width.checked_sub(used) {
        Some(room) if room >= word.len() + 2 => format!("{word:^room$}"),
        Some(room) => " ".repeat(room),
        None => String::new(),
    };
    let line = clip(&format!("{left}{middle}{right}"), width);
    frame.render_widget(Line::styled(line, theme.style(Role::Faint)), area);
}
