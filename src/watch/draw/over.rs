//! What lies over the panels: the keys, the list of runs, what the prompts gave, a question.

use cohort_common::api::{RunInfo, SampleInfo};
use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::text::{Line, Span, Text};
use ratatui::widgets::{Block, Clear, Paragraph, Wrap};

use super::panels::{age, one_line};
use super::{Role, Theme};
use crate::output::table;
use crate::step_line::clip;
use crate::watch::keys::KEYS;
use crate::watch::state::{Action, Over, State};

/// Draws what lies over the panels of `area`, if anything does.
pub fn draw(frame: &mut Frame, area: Rect, state: &State, theme: Theme) {
    match &state.over {
        Over::Nothing => {}
        Over::Help => help(frame, area, theme),
        Over::Runs(marked) => runs(frame, area, state, *marked, theme),
        Over::Samples(at) => samples(frame, area, state, *at, theme),
        Over::Question(action) => question(frame, area, state, *action, theme),
    }
}

/// A box in the middle; gives its inside.
fn window(
    frame: &mut Frame,
    area: Rect,
    title: &str,
    (width, height): (u16, u16),
    theme: Theme,
) -> Rect {
    let width = width.saturating_add(4).min(area.width);
    let height = height.saturating_add(2).min(area.height);
    let own = Rect {
        x: area.x + (area.width - width) / 2,
        y: area.y + (area.height - height) / 2,
        width,
        height,
    };
    let block = Block::bordered().title(Span::styled(
        format!(" {title} "),
        theme.style(Role::Strong),
    ));
    let inside = block.inner(own);
    frame.render_widget(Clear, own);
    frame.render_widget(block, own);
    Rect {
        x: inside.x + u16::from(inside.width > 2),
        width: inside.width.saturating_sub(2),
        ..inside
    }
}

fn help(frame: &mut Frame, area: Rect, theme: Theme) {
    let rows = KEYS.map(|(key, does)| {
        Line::from(vec![
            Span::styled(format!("{key:<14}"), theme.style(Role::Strong)),
            Span::raw(does),
        ])
    });
    let widest = rows.iter().map(Line::width).max().unwrap_or(0) as u16;
    let inside = window(frame, area, "keys", (widest, rows.len() as u16), theme);
    frame.render_widget(Text::from_iter(rows), inside);
}

/// The runs, newest first, with one of them marked.
fn runs(frame: &mut Frame, area: Rect, state: &State, marked: usize, theme: Theme) {
    let head = ["run", "status", "step", "loss", "submitted"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    rows.extend(state.runs.iter().rev().map(|run| row(run, state.now_ms)));
    let text = table(&rows);
    let mut lines: Vec<&str> = text.lines().collect();
    let widest = lines.iter().map(|line| line.chars().count()).max();
    let size = (widest.unwrap_or(0) as u16, lines.len() as u16);
    let inside = window(frame, area, "runs: Enter chooses", size, theme);
    let head = lines.remove(0);
    let room = usize::from(inside.height.saturating_sub(1));
    // The marked one stays in sight.
    let first = (marked + 1).saturating_sub(room);
    let width = usize::from(inside.width);
    let mut shown = vec![Line::styled(clip(head, width), theme.style(Role::Faint))];
    for (i, line) in lines.iter().enumerate().skip(first).take(room) {
        let role = if i == marked {
            Role::Marked
        } else {
            Role::Plain
        };
        shown.push(Line::styled(clip(line, width), theme.style(role)));
    }
    frame.render_widget(Text::from(shown), inside);
}

fn row(run: &RunInfo, now_ms: u64) -> Vec<String> {
    let loss = run.last_step.as_ref().map(|step| step.loss);
    vec![
        run.name.clone(),
        run.status.clone(),
        format!("{}/{}", run.step, run.spec.train.steps),
        loss.map_or("-".into(), |loss| format!("{loss:.4}")),
        format!("{} ago", age(now_ms, run.created_ms)),
    ]
}

/// What the prompts gave, newest step first.
fn samples(frame: &mut Frame, area: Rect, state: &State, at: usize, theme: Theme) {
    let mut samples: Vec<&SampleInfo> = state.run.iter().flat_map(|run| &run.samples).collect();
    samples.sort_by_key(|sample| (u64::MAX - sample.step, sample.index));
    let inside = window(frame, area, "samples", (area.width, area.height), theme);
    let mut lines = Vec::new();
    for sample in samples.into_iter().skip(at) {
        let head = format!("step {}, prompt {}", sample.step, sample.index + 1);
        lines.push(Line::styled(head, theme.style(Role::Faint)));
        let texts = format!("{}{}", sample.prompt, sample.text);
        let prompt = sample.prompt.lines().count().max(1);
        for (i, line) in texts.lines().enumerate() {
            // The prompt's last line goes on with what the model has written.
            let last = sample.prompt.lines().next_back().unwrap_or_default();
            let cut = match (i + 1).cmp(&prompt) {
                std::cmp::Ordering::Less => line.len(),
                std::cmp::Ordering::Equal => last.len().min(line.len()),
                std::cmp::Ordering::Greater => 0,
            };
            let (given, made) = line.split_at(cut);
            lines.push(Line::from(vec![
                Span::styled(one_line(given), theme.style(Role::Strong)),
                Span::raw(one_line(made)),
            ]));
        }
        lines.push(Line::default());
    }
    let text = Paragraph::new(lines).wrap(Wrap { trim: false });
    frame.render_widget(text, inside);
}

fn question(frame: &mut Frame, area: Rect, state: &State, action: Action, theme: Theme) {
    let name = state.run.as_ref().map_or("", |run| run.info.name.as_str());
    let (asked, means) = match action {
        Action::Pause => (
            format!("Pause {name}?"),
            "It is checkpointed and rests; its workers are free. u goes on with it.",
        ),
        Action::Checkpoint => (
            format!("Write a checkpoint of {name}?"),
            "It goes on; the checkpoint is of the next step that is vouched for.",
        ),
        Action::Resume => (
            format!("Go on with {name}?"),
            "It goes on from its newest checkpoint.",
        ),
        Action::Cancel => (
            format!("Cancel {name}?"),
            "It ends for good where it is; its checkpoints stay.",
        ),
    };
    let lines = [asked.as_str(), means, "", "y yes    n no"];
    let widest = lines
        .iter()
        .map(|line| line.chars().count())
        .max()
        .unwrap_or(0);
    let wraps = widest + 4 > usize::from(area.width);
    let height = if wraps { 6 } else { 4 };
    let inside = window(frame, area, action.verb(), (widest as u16, height), theme);
    let text = Paragraph::new(lines.map(Line::raw).to_vec()).wrap(Wrap { trim: false });
    frame.render_widget(text, inside);
}
