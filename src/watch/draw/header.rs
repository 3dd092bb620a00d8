//! The first lines: which run, how it stands, how far it is, and the figures of its newest step.

use cohort_common::api::{EvalEvent, RunView};
use cohort_common::spec::human_count;
use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::text::{Line, Span};

use super::{Role, Theme};
use crate::step_line::{Figure, clip, eta, figures, fit};
use crate::watch::state::{Link, State};

/// Columns of the bar, at most and at least.
const BAR: (usize, usize) = (40, 8);

/// Draws as many of the lines as there is room for.
pub fn draw(frame: &mut Frame, area: Rect, state: &State, theme: Theme) {
    let width = usize::from(area.width);
    let lines = match &state.run {
        Some(run) => vec![
            standing(run, state, width, theme),
            newest(state, width),
            known(run, state, width, theme),
        ],
        None => vec![Line::from(clip(&nothing(state), width))],
    };
    for (line, row) in lines.into_iter().zip(area.rows()) {
        frame.render_widget(line, row);
    }
}

fn nothing(state: &State) -> String {
    match (&state.look.run, &state.link) {
        (Some(run), _) => format!(" {run} …"),
        (None, Link::Live) => " no runs yet; `cohort pretrain` makes one".into(),
        (None, _) => " …".into(),
    }
}

/// `tiny-1  running  [bar]  37 %  step 740/2000  ETA 1 min 02 s`
fn standing(run: &RunView, state: &State, width: usize, theme: Theme) -> Line<'static> {
    let info = &run.info;
    let (step, steps) = match &state.newest {
        Some(newest) => (newest.step, newest.steps),
        None => (info.step, info.spec.train.steps),
    };
    let (word, role) = word(run, state);
    let role = theme.style(role);
    let name = clip(&format!(" {}", info.name), width.saturating_sub(10).max(1));
    let percent = 100 * step / steps.max(1);
    let rest = [
        Figure::new(0, format!("{percent:>3} %")),
        Figure::new(1, format!("step {step}/{steps}")),
    ];
    let rest: Vec<Figure> = rest.into_iter().chain(eta(run.eta_seconds)).collect();
    let used = Span::raw(name.as_str()).width() + 2 + Span::raw(word.as_str()).width();
    let room = width.saturating_sub(used + 2);
    let rest = fit(&rest, room);
    let bar = room.saturating_sub(Span::raw(rest.as_str()).width() + 2);
    let mut line = Line::from(vec![
        Span::styled(name, theme.style(Role::Strong)),
        Span::raw("  "),
        Span::styled(word, role),
        Span::raw("  "),
    ]);
    if bar >= BAR.1 {
        let bar = bar.min(BAR.0);
        let full = (bar as u64 * step / steps.max(1)).min(bar as u64) as usize;
        line.push_span(Span::styled("█".repeat(full), theme.style(Role::Train)));
        line.push_span(Span::styled(
            "░".repeat(bar - full),
            theme.style(Role::Faint),
        ));
        line.push_span("  ");
    }
    line.push_span(rest);
    line
}

/// What the run does, in a word or a few.
fn word(run: &RunView, state: &State) -> (String, Role) {
    let newest = run.timeline.last();
    let status = run.info.status.as_str();
    let role = match status {
        "running" | "finished" => Role::Good,
        "failed" => Role::Bad,
        _ => Role::Warning,
    };
    let waits = newest.filter(|entry| {
        status == "running" && matches!(entry.kind.as_str(), "waiting" | "loading")
    });
    let word = match (run.info.queue_place, waits, &state.link) {
        (Some(place), _, _) => format!("{status}, place {place}"),
        (None, Some(entry), _) => entry.kind.clone(),
        (None, None, Link::Lost(_)) => format!("{status}?"),
        (None, None, _) => status.to_owned(),
    };
    (word, role)
}

fn newest(state: &State, width: usize) -> Line<'static> {
    match &state.newest {
        Some(step) => {
            let mut all = figures(step);
            if let Some(first) = all.first_mut() {
                first.text.insert(0, ' ');
            }
            Line::from(fit(&all, width))
        }
        None => Line::from(clip(" no step yet", width)),
    }
}

/// Validation, data, model, workers; or why the run failed.
fn known(run: &RunView, state: &State, width: usize, theme: Theme) -> Line<'static> {
    if let Some(error) = &run.info.error {
        return Line::styled(clip(&format!(" {error}"), width), theme.style(Role::Bad));
    }
    let facts = &run.facts;
    let mut all = Vec::new();
    let evals = || run.info.evals.iter().filter(|e| e.split == "validation");
    if let Some(last) = evals().next_back() {
        all.push(Figure::new(1, validation(last)));
        let best = evals().min_by(|a, b| a.loss.total_cmp(&b.loss));
        if let Some(best) = best.filter(|best| best.step != last.step) {
            let text = format!("best {:.4} at {}", best.loss, best.step);
            all.push(Figure::new(4, text));
        }
    }
    if let Some(step) = &state.newest {
        let (number, part) = (step.epoch.floor() + 1.0, 100.0 * step.epoch.fract());
        let of = match facts.corpus.is_empty() {
            true => String::new(),
            false => format!(" of {}", facts.corpus),
        };
        let text = format!("{part:.0} % of epoch {number:.0}{of}");
        all.push(Figure::new(3, text));
    }
    if facts.parameters > 0 {
        let text = format!("{} parameters", human_count(facts.parameters));
        all.push(Figure::new(5, text));
    }
    if let Some(cluster) = &state.cluster {
        let text = match cluster.workers.len() {
            1 => "1 worker".to_owned(),
            n => format!("{n} workers"),
        };
        all.push(Figure::new(2, text));
    }
    if let Some(first) = all.first_mut() {
        first.text.insert(0, ' ');
    }
    Line::styled(fit(&all, width), theme.style(Role::Plain))
}

fn validation(eval: &EvalEvent) -> String {
    let more = match (&eval.classes, eval.bits_per_byte) {
        (Some(classes), _) => format!(", accuracy {:.1} %", 100.0 * classes.accuracy),
        (None, Some(bits)) => format!(", bpb {bits:.3}"),
        (None, None) => String::new(),
    };
    format!("validation {:.4}{more} at {}", eval.loss, eval.step)
}
