//! The panels below the charts: workers, what happened, checkpoints.

use cohort_common::api::{CheckpointInfo, TimeSplit, TimelineEntry, WorkerView};
use cohort_common::spec::{human_bytes, human_count};
use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::style::Style;
use ratatui::text::{Line, Span};
use unicode_width::UnicodeWidthStr;

use super::{Role, Theme, titled};
use crate::step_line::{Figure, clip, fit};
use crate::watch::state::{Link, Panel, State};

/// Cells of the bar with a worker's times.
const BAR: usize = 16;

/// How a worker's time goes: the sign and the word of each part.
const PARTS: [(char, &str, Role); 4] = [
    ('█', "compute", Role::Compute),
    ('▓', "exchange", Role::Exchange),
    ('▒', "data", Role::Data),
    ('░', "wait", Role::Wait),
];

/// A column of a table.
struct Column {
    name: &'static str,
    right: bool,
    cells: Vec<String>,
}

impl Column {
    fn left(name: &'static str, cells: impl IntoIterator<Item = String>) -> Self {
        let cells = cells.into_iter().collect();
        let right = false;
        Self { name, right, cells }
    }

    fn right(name: &'static str, cells: impl IntoIterator<Item = String>) -> Self {
        let column = Self::left(name, cells);
        Self {
            right: true,
            ..column
        }
    }

    fn width(&self) -> usize {
        let cells = self.cells.iter().map(|cell| cell.width());
        cells.max().unwrap_or(0).max(self.name.width())
    }

    fn cell(&self, text: &str) -> String {
        let space = " ".repeat(self.width().saturating_sub(text.width()));
        match self.right {
            true => format!("{space}{text}"),
            false => format!("{text}{space}"),
        }
    }
}

/// Draws the workers.
pub fn workers(frame: &mut Frame, area: Rect, state: &State, theme: Theme) {
    let chosen = state.panel == Panel::Workers;
    let workers = state.cluster.as_ref().map_or(&[][..], |c| &c.workers);
    let inner = titled(
        frame,
        area,
        ("workers", chosen),
        times_legend(workers, theme),
        theme,
    );
    if workers.is_empty() {
        let text = match (&state.link, &state.cluster) {
            (Link::Live, Some(_)) => "none; `cohort worker` joins one",
            _ => "not known",
        };
        frame.render_widget(
            Line::styled(format!(" {text}"), theme.style(Role::Faint)),
            inner,
        );
        return;
    }
    let columns = columns(workers, inner.width);
    let head = columns.iter().map(|column| column.cell(column.name));
    let head = format!(" {}", head.collect::<Vec<_>>().join("  "));
    let mut lines = vec![Line::styled(head, theme.style(Role::Faint))];
    for (i, worker) in workers
        .iter()
        .enumerate()
        .skip(state.scrolled(Panel::Workers))
    {
        let late = worker.straggler.is_some();
        let role = if late { Role::Warning } else { Role::Plain };
        let cells = columns.iter().map(|column| column.cell(&column.cells[i]));
        let sign = if late { '!' } else { ' ' };
        let text = format!("{sign}{}  ", cells.collect::<Vec<_>>().join("  "));
        let mut line = Line::from(Span::styled(text, theme.style(role)));
        line.spans
            .extend(worker.times.iter().flat_map(|times| bar(times, theme)));
        if let Some(why) = &worker.straggler {
            line.push_span(Span::styled(format!("  {why}"), theme.style(Role::Warning)));
        }
        lines.push(line);
    }
    put(frame, inner, lines);
}

/// The columns before the bar, as many as there is room for.
fn columns(workers: &[WorkerView], width: u16) -> Vec<Column> {
    let each = |of: &dyn Fn(&WorkerView) -> String| workers.iter().map(of).collect::<Vec<_>>();
    let known = |value: Option<String>| value.unwrap_or_else(|| "-".into());
    let mut columns = vec![
        Column::left("name", each(&|w| w.name.clone())),
        Column::left("device", each(&|w| format!("{}/{}", w.device, w.threads))),
        Column::right("lanes", each(&|w| w.lanes.to_string())),
        Column::right(
            "tok/s",
            each(&|w| known(w.tokens_per_second.map(|speed| human_count(speed as u64)))),
        ),
    ];
    if width >= 76 {
        let mfu = each(&|w| known(w.mfu.map(|mfu| format!("{:.0} %", 100.0 * mfu))));
        columns.push(Column::right("MFU", mfu));
    }
    if width >= 90 {
        let memory = each(&|w| known(w.rss_bytes.map(human_bytes)));
        columns.push(Column::right("memory", memory));
    }
    if width >= 100 {
        let sent = |w: &WorkerView| {
            let both = w.sent_per_second.zip(w.received_per_second);
            known(both.map(|(out, back)| format!("{}/s", human_bytes((out + back) as u64))))
        };
        columns.push(Column::right("network", each(&sent)));
    }
    if width >= 125 {
        let line = |w: &WorkerView| {
            let both = w.line_bytes_per_second.zip(w.line_rtt_ms);
            known(both.map(|(speed, rtt)| format!("{}/s, {rtt:.1} ms", human_bytes(speed))))
        };
        columns.push(Column::right("line", each(&line)));
    }
    if width >= 110 {
        let host = each(&|w| clip(&w.host, 20));
        columns.insert(1, Column::left("host", host));
    }
    columns
}

fn times_legend(workers: &[WorkerView], theme: Theme) -> Line<'static> {
    let mut line = Line::from(workers.len().to_string());
    if workers.iter().any(|worker| worker.times.is_some()) {
        for (sign, word, role) in PARTS {
            line.push_span(Span::styled(format!("  {sign}"), theme.style(role)));
            line.push_span(format!(" {word}"));
        }
    }
    line
}

/// How a worker's time went, as a bar whose cells are shared out by the largest remainders.
fn bar(times: &TimeSplit, theme: Theme) -> Vec<Span<'static>> {
    let parts = [times.compute, times.exchange, times.data, times.wait];
    let cells = shared_out(parts, BAR);
    let span = |((sign, _, role), count): ((char, &str, Role), usize)| {
        Span::styled(sign.to_string().repeat(count), theme.style(role))
    };
    PARTS.into_iter().zip(cells).map(span).collect()
}

fn shared_out(parts: [f64; 4], cells: usize) -> [usize; 4] {
    let parts = parts.map(|part| if part.is_finite() { part.max(0.0) } else { 0.0 });
    let sum: f64 = parts.iter().sum();
    if sum <= 0.0 {
        return [0; 4];
    }
    let exact = parts.map(|part| part / sum * cells as f64);
    let mut whole = exact.map(|part| part.floor() as usize);
    let mut order = [0, 1, 2, 3];
    order.sort_by(|a, b| exact[*b].fract().total_cmp(&exact[*a].fract()));
    let missing = cells.saturating_sub(whole.iter().sum());
    for place in order.into_iter().take(missing) {
        whole[place] += 1;
    }
    whole
}

/// Draws what happened, newest first.
pub fn events(frame: &mut Frame, area: Rect, state: &State, theme: Theme) {
    let chosen = state.panel == Panel::Events;
    let count = state.rows(Panel::Events);
    let inner = titled(
        frame,
        area,
        ("events", chosen),
        Line::from(count.to_string()),
        theme,
    );
    let shown = state.events().skip(state.scrolled(Panel::Events));
    let shown = shown.take(usize::from(inner.height));
    let lines = shown.map(|entry| event(entry, state.now_ms, usize::from(inner.width), theme));
    put(frame, inner, lines.collect());
}

/// `  12 s  step 812: lanes 4,5 of w3 redone by w1,w2  +0.31 s`
fn event(entry: &TimelineEntry, now_ms: u64, width: usize, theme: Theme) -> Line<'static> {
    let age = format!("{:>5} ", age(now_ms, entry.time_ms));
    let cost = match entry.cost_ms {
        Some(cost) => format!(" +{:.2} s", cost as f64 / 1000.0),
        None => String::new(),
    };
    let role = match entry.kind.as_str() {
        "worker_lost" | "redone" | "anomaly" => Role::Warning,
        "failed" => Role::Bad,
        "finished" => Role::Good,
        _ => Role::Plain,
    };
    let room = width.saturating_sub(age.width() + cost.width());
    let text = clip(&one_line(&entry.text), room);
    let space = " ".repeat(room.saturating_sub(text.width()));
    Line::from(vec![
        Span::styled(age, theme.style(Role::Faint)),
        Span::styled(text, theme.style(role)),
        Span::styled(format!("{space}{cost}"), theme.style(Role::Warning)),
    ])
}

/// Draws the checkpoints, newest first.
pub fn checkpoints(frame: &mut Frame, area: Rect, state: &State, theme: Theme) {
    let chosen = state.panel == Panel::Checkpoints;
    let all = state
        .run
        .as_ref()
        .map_or(&[][..], |run| &run.info.checkpoints);
    let about = Line::from(all.len().to_string());
    let inner = titled(frame, area, ("checkpoints", chosen), about, theme);
    let losses = all.iter().filter_map(|checkpoint| checkpoint.val_loss);
    let best = losses.reduce(f64::min);
    let shown = all.iter().rev().skip(state.scrolled(Panel::Checkpoints));
    let line = |checkpoint: &CheckpointInfo| {
        let is_best = best.is_some() && checkpoint.val_loss == best;
        let loss = checkpoint.val_loss.map(|loss| format!("loss {loss:.4}"));
        let known = [
            Some(Figure::new(0, format!(" step {}", checkpoint.step))),
            is_best.then(|| Figure::new(1, "best")),
            loss.map(|loss| Figure::new(2, loss)),
            Some(Figure::new(3, human_bytes(checkpoint.bytes))),
        ];
        let known: Vec<Figure> = known.into_iter().flatten().collect();
        let text = fit(&known, usize::from(inner.width));
        let style = if is_best {
            theme.style(Role::Good)
        } else {
            Style::new()
        };
        Line::styled(text, style)
    };
    put(frame, inner, shown.map(line).collect());
}

/// Lines below each other, as many as there is room for.
pub fn put(frame: &mut Frame, area: Rect, lines: Vec<Line>) {
    for (line, row) in lines.into_iter().zip(area.rows()) {
        frame.render_widget(line, row);
    }
}

/// Text without what would break a line.
pub fn one_line(text: &str) -> String {
    text.split(char::is_control).collect::<Vec<_>>().join(" ")
}

/// How long ago something was, in few letters.
pub fn age(now_ms: u64, then_ms: u64) -> String {
    let seconds = now_ms.saturating_sub(then_ms) / 1000;
    match seconds {
        0..100 => format!("{seconds}s"),
        100..6000 => format!("{}min", seconds / 60),
        6000..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_has_all_its_cells_and_each_part_its_share() {
        assert_eq!(shared_out([0.5, 0.25, 0.0, 0.25], 16), [8, 4, 0, 4]);
        assert_eq!(shared_out([1.0, 1.0, 1.0, 0.0], 16), [6, 5, 5, 0]);
        assert_eq!(shared_out([0.0; 4], 16), [0; 4]);
        assert_eq!(shared_out([f64::NAN, 1.0, 0.0, 0.0], 16), [0, 16, 0, 0]);
    }

    #[test]
    fn ages_are_short() {
        assert_eq!(age(5_000, 9_000), "0s");
        assert_eq!(age(99_999, 0), "99s");
        assert_eq!(age(100_000, 0), "1min");
        assert_eq!(age(7_200_000, 0), "2h");
        assert_eq!(age(200_000_000, 0), "2d");
        assert_eq!(one_line("a\nb"), "a b");
    }
}
