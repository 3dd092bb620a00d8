//! What is seen of a [`State`]. **Pure:** the same state gives the same picture for the same size of the terminal.
//!
//! This file says where everything goes. What does not fit is left out, from the least important on: first the small
//! charts and the panels beside others, then all panels but the chosen one, and in the end all but the first line.

mod chart;
mod figures;
mod header;
mod over;
mod panels;
mod raster;
#[cfg(test)]
mod tests;
mod theme;

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::text::{Line, Span};

use super::state::{Link, Panel, State};
use crate::step_line::{Figure, clip, fit};
pub use theme::{Role, Theme};

/// From this width on charts and panels stand beside each other.
const WIDE: u16 = 66;
/// From this height of the middle on there are charts and panels at once.
const TALL: u16 = 13;
/// Rows of the header, where there is room.
const HEADER: u16 = 3;

/// Where everything goes; what has no room has no place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Places {
    header: Rect,
    loss: Option<Rect>,
    figures: Option<Rect>,
    workers: Option<Rect>,
    events: Option<Rect>,
    checkpoints: Option<Rect>,
    footer: Option<Rect>,
}

/// Draws everything.
pub fn dashboard(frame: &mut Frame, state: &State, theme: Theme) {
    let area = frame.area();
    let places = places(area, state.panel, state.rows(Panel::Workers));
    header::draw(frame, places.header, state, theme);
    if let Some(area) = places.loss {
        chart::draw(frame, area, state, theme);
    }
    if let Some(area) = places.figures {
        figures::draw(frame, area, state, theme);
    }
    if let Some(area) = places.workers {
        panels::workers(frame, area, state, theme);
    }
    if let Some(area) = places.events {
        panels::events(frame, area, state, theme);
    }
    if let Some(area) = places.checkpoints {
        panels::checkpoints(frame, area, state, theme);
    }
    if let Some(area) = places.footer {
        footer(frame, area, state, theme);
    }
    over::draw(frame, area, state, theme);
}

/// Columns of dots that a chart may have on a terminal of this size.
pub fn dots(area: Rect) -> usize {
    2 * usize::from(area.width)
}

fn places(area: Rect, panel: Panel, workers: usize) -> Places {
    let header = match area.height {
        10.. => HEADER,
        6..10 => 2,
        _ => 1,
    };
    let footer = u16::from(area.height >= 5);
    let [top, middle, foot] = Layout::vertical([
        Constraint::Length(header),
        Constraint::Fill(1),
        Constraint::Length(footer),
    ])
    .areas(area);
    let mut places = Places {
        header: top,
        footer: (footer > 0).then_some(foot),
        ..Places::default()
    };
    match middle.height {
        0..3 => {}
        3..TALL => place_one(&mut places, middle, panel),
        TALL.. => {
            let lower = (middle.height / 2).max(8).min(middle.height - 6);
            let [charts, below] =
                Layout::vertical([Constraint::Fill(1), Constraint::Length(lower)]).areas(middle);
            place_charts(&mut places, charts);
            place_panels(&mut places, below, panel, workers);
        }
    }
    places
}

/// Room for one panel only.
fn place_one(places: &mut Places, area: Rect, panel: Panel) {
    match panel {
        Panel::Charts => place_charts(places, area),
        Panel::Workers => places.workers = Some(area),
        Panel::Events => places.events = Some(area),
        Panel::Checkpoints => places.checkpoints = Some(area),
    }
}

fn place_charts(places: &mut Places, area: Rect) {
    if area.width < WIDE {
        places.loss = Some(area);
        return;
    }
    let [loss, figures] = Layout::horizontal([Constraint::Fill(5), Constraint::Fill(3)])
        .spacing(1)
        .areas(area);
    places.loss = Some(loss);
    places.figures = Some(figures);
}

fn place_panels(places: &mut Places, area: Rect, panel: Panel, workers: usize) {
    if area.width < WIDE {
        let panel = match panel {
            Panel::Charts => Panel::Workers,
            other => other,
        };
        return place_one(places, area, panel);
    }
    // A title, the names of the columns, and the workers; the half at most, unless they are what is looked at.
    let wanted = u16::try_from(workers.max(1))
        .unwrap_or(u16::MAX)
        .saturating_add(2);
    let most = match panel {
        Panel::Workers => area.height - 3,
        _ => area.height / 2,
    };
    let [above, below] =
        Layout::vertical([Constraint::Length(wanted.min(most)), Constraint::Fill(1)]).areas(area);
    let [events, checkpoints] = Layout::horizontal([Constraint::Fill(5), Constraint::Fill(3)])
        .spacing(1)
        .areas(below);
    places.workers = Some(above);
    places.events = Some(events);
    places.checkpoints = Some(checkpoints);
}

/// The last line: what a person should know, else the keys.
fn footer(frame: &mut Frame, area: Rect, state: &State, theme: Theme) {
    let width = usize::from(area.width);
    let said = match (&state.notice, &state.link) {
        (Some(notice), _) => Some(notice.clone()),
        (None, Link::Live) => None,
        (None, Link::Lost(why)) => Some(format!("looking for the coordinator: {why}")),
        (None, Link::Home(home)) => Some(format!(
            "no coordinator runs; this is what {home} has of it"
        )),
    };
    let line = match said {
        Some(said) => Line::styled(clip(&format!(" {said} "), width), theme.style(Role::Marked)),
        None => {
            let keys = [
                Figure::new(0, " q leave"),
                Figure::new(0, "? keys"),
                Figure::new(1, "Tab panel"),
                Figure::new(2, "r runs"),
                Figure::new(3, "p pause"),
                Figure::new(3, "u resume"),
                Figure::new(4, "l log"),
                Figure::new(4, "x axis"),
                Figure::new(4, "+ - zoom"),
                Figure::new(5, "s samples"),
            ];
            Line::styled(fit(&keys, width), theme.style(Role::Faint))
        }
    };
    frame.render_widget(line, area);
}

/// The first row of a panel: its name, marked if it is chosen, and words about it. Gives the rest of the panel.
fn titled(
    frame: &mut Frame,
    area: Rect,
    (name, chosen): (&str, bool),
    about: Line,
    theme: Theme,
) -> Rect {
    let [top, rest] = Layout::vertical([Constraint::Length(1), Constraint::Fill(1)]).areas(area);
    let role = if chosen { Role::Marked } else { Role::Strong };
    let mut line = Line::from(Span::styled(format!(" {name} "), theme.style(role)));
    line.push_span(" ");
    line.spans.extend(about.spans);
    let rule = usize::from(top.width).saturating_sub(line.width() + 1);
    line.push_span(Span::styled(
        format!(" {}", "─".repeat(rule)),
        theme.style(Role::Faint),
    ));
    frame.render_widget(line, top);
    rest
}
