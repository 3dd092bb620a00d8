//! Small charts, one below the other: gradient norm, learning rate, speed, and how much of the processors the model uses.

use cohort_common::api::{Band, History, StepEvent};
use cohort_common::spec::human_count;
use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::text::Line;

use super::chart::points;
use super::raster::{Point, Raster, Window};
use super::{Role, Theme, titled};
use crate::watch::state::State;

/// Rows of a small chart with its title, at least.
const LEAST: u16 = 3;

/// A metric.
struct Figure {
    name: &'static str,
    of_history: fn(&History) -> &Band,
    of_step: fn(&StepEvent) -> Option<f64>,
    words: fn(f64) -> String,
}

/// What is shown, the most important first.
const FIGURES: [Figure; 4] = [
    Figure {
        name: "tokens/s",
        of_history: |history| &history.tokens_per_second,
        of_step: |step| Some(step.tokens_per_second).filter(|speed| *speed > 0.0),
        words: |value| human_count(value as u64),
    },
    Figure {
        name: "gradient norm",
        of_history: |history| &history.grad_norm,
        of_step: |step| Some(step.grad_norm),
        words: |value| format!("{value:.3}"),
    },
    Figure {
        name: "learning rate",
        of_history: |history| &history.learning_rate,
        of_step: |step| Some(step.learning_rate),
        words: |value| format!("{value:.2e}"),
    },
    Figure {
        name: "MFU",
        of_history: |history| &history.mfu,
        of_step: |step| step.mfu,
        words: |value| format!("{:.0} %", 100.0 * value),
    },
];

/// Draws as many as there is room for, of those that have values.
pub fn draw(frame: &mut Frame, area: Rect, state: &State, theme: Theme) {
    let has_values = |figure: &&Figure| {
        let means = &(figure.of_history)(&state.history).mean;
        means.iter().any(Option::is_some)
    };
    let shown: Vec<&Figure> = FIGURES.iter().filter(has_values).collect();
    let most = usize::from(area.height / LEAST).max(1);
    let count = shown.len().min(most) as u16;
    for (i, figure) in (0..count).zip(shown) {
        // What is left over when the rows are divided goes to the last one.
        let each = area.height / count;
        let height = if i + 1 == count {
            area.height - each * i
        } else {
            each
        };
        let own = Rect {
            y: area.y + each * i,
            height,
            ..area
        };
        draw_one(frame, own, figure, state, theme);
    }
}

fn draw_one(frame: &mut Frame, area: Rect, figure: &Figure, state: &State, theme: Theme) {
    let newest = state.newest.as_ref().and_then(figure.of_step);
    let value = newest.map_or(String::new(), figure.words);
    let inner = titled(frame, area, (figure.name, false), Line::from(value), theme);
    let points = points(
        &state.history,
        (figure.of_history)(&state.history),
        state.axis,
    );
    let ys = || {
        let values = points.iter().filter_map(|point| point.y);
        values.filter(|value| value.is_finite())
    };
    let (Some(first), Some(last)) = (points.first(), points.last()) else {
        return;
    };
    let (Some(low), Some(high)) = (ys().reduce(f64::min), ys().reduce(f64::max)) else {
        return;
    };
    let window = Window {
        x: (first.x, last.x),
        y: (low, high),
        logarithmic: false,
    };
    let mut raster = Raster::new(inner.width, inner.height);
    let means: Vec<_> = points
        .iter()
        .map(|point| Point {
            range: None,
            ..*point
        })
        .collect();
    raster.curve(&means, &window);
    let style = theme.style(Role::Train);
    raster.render(inner, frame.buffer_mut(), style, style);
}
