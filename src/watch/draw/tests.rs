//! Pictures of the dashboard in terminals of several sizes.

use insta::assert_snapshot;
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::KeyCode;
use ratatui::style::Color;

use super::{Theme, dashboard};
use crate::watch::state::{Link, News, Over, State};
use crate::watch::tests::{press, samples, state};

fn drawn(state: &State, theme: Theme, (width, height): (u16, u16)) -> TestBackend {
    let backend = TestBackend::new(width, height);
    let mut terminal = Terminal::new(backend).expect("it has no file");
    let frame = terminal.draw(|frame| dashboard(frame, state, theme));
    frame.expect("nothing can fail");
    terminal.backend().clone()
}

fn picture(state: &State, size: (u16, u16)) -> String {
    drawn(state, Theme::new(true), size).to_string()
}

#[test]
fn the_usual_terminal() {
    assert_snapshot!(picture(&state("running", 700), (80, 24)));
}

#[test]
fn a_large_terminal() {
    assert_snapshot!(picture(&state("running", 700), (120, 40)));
}

#[test]
fn a_small_terminal_has_one_panel_at_a_time() {
    let mut state = state("running", 700);
    assert_snapshot!("small_charts", picture(&state, (40, 12)));
    press(&mut state, KeyCode::Tab);
    assert_snapshot!("small_workers", picture(&state, (40, 12)));
    press(&mut state, KeyCode::Tab);
    assert_snapshot!("small_events", picture(&state, (40, 12)));
}

#[test]
fn a_run_that_rests_without_a_coordinator() {
    let mut state = state("interrupted", 700);
    state.take(News::Link(Link::Home(
        "/home/me/.local/share/cohort".into(),
    )));
    assert_snapshot!(picture(&state, (80, 24)));
}

#[test]
fn before_the_first_step() {
    assert_snapshot!(picture(&state("running", 0), (80, 24)));
}

#[test]
fn the_windows_over_the_panels() {
    let mut state = state("running", 700);
    press(&mut state, KeyCode::Char('?'));
    assert_snapshot!("help", picture(&state, (80, 24)));
    press(&mut state, KeyCode::Esc);
    press(&mut state, KeyCode::Char('p'));
    assert_snapshot!("question", picture(&state, (80, 24)));
    press(&mut state, KeyCode::Char('n'));
    press(&mut state, KeyCode::Char('r'));
    assert_snapshot!("runs", picture(&state, (80, 24)));
    press(&mut state, KeyCode::Esc);
    let run = state.run.as_mut().expect("there is one");
    run.samples = samples("tiny-1");
    press(&mut state, KeyCode::Char('s'));
    assert_snapshot!("samples", picture(&state, (60, 14)));
}

#[test]
fn a_logarithmic_scale_over_tokens_of_the_last_steps() {
    let mut state = state("running", 700);
    for key in ['l', 'x', '+'] {
        press(&mut state, KeyCode::Char(key));
    }
    assert_snapshot!(picture(&state, (80, 24)));
}

#[test]
fn no_size_panics() {
    let mut shown = vec![
        State::new(None, Link::Live, 0),
        State::new(Some("tiny-1".into()), Link::Lost("gone".into()), 0),
        state("running", 0),
        state("running", 1),
        state("failed", 700),
    ];
    for over in [Over::Help, Over::Runs(1), Over::Samples(0)] {
        let mut state = state("running", 700);
        state.run.as_mut().expect("there is one").samples = samples("tiny-1");
        state.over = over;
        state.logarithmic = true;
        shown.push(state);
    }
    for state in &shown {
        for width in (0..20).chain([40, 66, 80, 150]) {
            for height in (0..20).chain([24, 60]) {
                drawn(state, Theme::new(true), (width, height));
            }
        }
    }
}

#[test]
fn without_colours_there_are_none() {
    let colors = |theme| {
        let backend = drawn(&state("running", 700), theme, (80, 24));
        let cells = backend.buffer().content().iter();
        cells
            .filter(|cell| cell.fg != Color::Reset || cell.bg != Color::Reset)
            .count()
    };
    assert_eq!(colors(Theme::new(false)), 0);
    assert!(colors(Theme::new(true)) > 0);
}
