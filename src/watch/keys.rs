//! What the keys do: they change what is seen, or ask for something to be done. **Pure.**

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyEventKind, KeyModifiers};

use super::state::{Action, Axis, Link, Over, Panel, State};

/// The steps can be halved so often.
const MOST_ZOOM: u32 = 20;
/// Rows that a page key scrolls.
const PAGE: usize = 10;

/// What a key asks for, beyond a change of what is seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Intent {
    /// To leave; runs go on.
    Quit,
    /// To do something to a run.
    Act(Action, String),
}

/// The keys and what they do, as the help shows them.
pub const KEYS: [(&str, &str); 17] = [
    ("q Esc Ctrl-C", "leave; the run goes on"),
    ("Tab", "next panel"),
    ("Up Down", "scroll the panel"),
    ("Left Right", "run before, run after"),
    ("r", "list of runs; Enter chooses"),
    ("l", "loss logarithmic or linear"),
    ("x", "over steps, tokens or time"),
    ("+ -", "the last half of the steps, or more"),
    ("0", "all steps"),
    ("s", "what the prompts gave"),
    ("p", "pause the run"),
    ("u", "go on with a run that rests"),
    ("k", "write a checkpoint now"),
    ("c", "cancel the run"),
    ("y n", "answer a question"),
    ("PgUp PgDn", "scroll faster"),
    ("?", "these keys"),
];

impl State {
    /// A key was pressed.
    pub fn press(&mut self, key: KeyEvent) -> Option<Intent> {
        if key.kind == KeyEventKind::Release {
            return None;
        }
        self.touch();
        self.notice = None;
        if key.modifiers.contains(KeyModifiers::CONTROL) {
            let quits = matches!(key.code, KeyCode::Char('c' | 'd'));
            return quits.then_some(Intent::Quit);
        }
        match self.over.clone() {
            Over::Nothing => self.press_on_panels(key.code),
            Over::Help => self.press_on_help(key.code),
            Over::Runs(marked) => self.press_on_runs(key.code, marked),
            Over::Samples(at) => self.press_on_samples(key.code, at),
            Over::Question(action) => self.answer(key.code, action),
        }
    }

    fn press_on_panels(&mut self, key: KeyCode) -> Option<Intent> {
        match key {
            KeyCode::Char('q') | KeyCode::Esc => return Some(Intent::Quit),
            KeyCode::Tab => self.next_panel(1),
            KeyCode::BackTab => self.next_panel(Panel::ALL.len() - 1),
            KeyCode::Up => self.scroll(|row| row.saturating_sub(1)),
            KeyCode::Down => self.scroll(|row| row + 1),
            KeyCode::PageUp => self.scroll(|row| row.saturating_sub(PAGE)),
            KeyCode::PageDown => self.scroll(|row| row + PAGE),
            KeyCode::Left => self.neighbour(|place| place.checked_sub(1)),
            KeyCode::Right => self.neighbour(|place| Some(place + 1)),
            KeyCode::Char('r') => self.list_runs(),
            KeyCode::Char('l') => self.logarithmic = !self.logarithmic,
            KeyCode::Char('x') => self.axis = next_axis(self.axis),
            KeyCode::Char('+' | '=') => self.look.zoom = (self.look.zoom + 1).min(MOST_ZOOM),
            KeyCode::Char('-') => self.look.zoom = self.look.zoom.saturating_sub(1),
            KeyCode::Char('0') => self.look.zoom = 0,
            KeyCode::Char('?' | 'h') => self.over = Over::Help,
            KeyCode::Char('s') => self.show_samples(),
            KeyCode::Char('p') => self.ask(Action::Pause),
            KeyCode::Char('u') => self.ask(Action::Resume),
            KeyCode::Char('k') => self.ask(Action::Checkpoint),
            KeyCode::Char('c') => self.ask(Action::Cancel),
            _ => {}
        }
        None
    }

    fn press_on_help(&mut self, key: KeyCode) -> Option<Intent> {
        self.over = Over::Nothing;
        (key == KeyCode::Char('q')).then_some(Intent::Quit)
    }

    fn press_on_runs(&mut self, key: KeyCode, marked: usize) -> Option<Intent> {
        let last = self.runs.len().saturating_sub(1);
        let to = match key {
            KeyCode::Up => marked.saturating_sub(1),
            KeyCode::Down => marked + 1,
            KeyCode::PageUp => marked.saturating_sub(PAGE),
            KeyCode::PageDown => marked + PAGE,
            KeyCode::Enter => {
                // The list shows the newest first.
                let chosen = self.runs.iter().rev().nth(marked);
                if let Some(name) = chosen.map(|run| run.name.clone()) {
                    self.turn_to(name);
                }
                self.close();
                return None;
            }
            KeyCode::Esc | KeyCode::Char('q' | 'r') => {
                self.close();
                return None;
            }
            _ => marked,
        };
        self.over = Over::Runs(to.min(last));
        None
    }

    fn press_on_samples(&mut self, key: KeyCode, at: usize) -> Option<Intent> {
        let last = self.run.as_ref().map_or(0, |run| run.samples.len());
        let to = match key {
            KeyCode::Up => at.saturating_sub(1),
            KeyCode::Down => at + 1,
            KeyCode::Esc | KeyCode::Char('q' | 's') => {
                self.close();
                return None;
            }
            _ => at,
        };
        self.over = Over::Samples(to.min(last.saturating_sub(1)));
        None
    }

    fn answer(&mut self, key: KeyCode, action: Action) -> Option<Intent> {
        match key {
            KeyCode::Char('y' | 'Y') => {
                self.close();
                let run = self.run.as_ref()?.info.name.clone();
                self.tell(match action {
                    Action::Pause => format!("{run} is being paused, with a checkpoint"),
                    Action::Checkpoint => format!("{run} is being checkpointed"),
                    Action::Resume => format!("{run} is being taken up again"),
                    Action::Cancel => format!("{run} is being cancelled"),
                });
                Some(Intent::Act(action, run))
            }
            KeyCode::Char('n' | 'N' | 'q') | KeyCode::Esc => {
                self.close();
                None
            }
            _ => None,
        }
    }

    fn close(&mut self) {
        self.over = Over::Nothing;
        self.look.runs = false;
    }

    fn next_panel(&mut self, by: usize) {
        let next = (self.panel as usize + by) % Panel::ALL.len();
        self.panel = Panel::ALL[next];
    }

    fn scroll(&mut self, to: impl Fn(usize) -> usize) {
        let last = self.rows(self.panel).saturating_sub(1);
        let row = &mut self.scrolled[self.panel as usize];
        *row = to(*row).min(last);
    }

    fn neighbour(&mut self, of: impl Fn(usize) -> Option<usize>) {
        let name = self.run.as_ref().map(|run| run.info.name.as_str());
        let here = self
            .runs
            .iter()
            .position(|run| Some(run.name.as_str()) == name);
        let there = here.and_then(of).and_then(|place| self.runs.get(place));
        match there.map(|run| run.name.clone()) {
            Some(name) => self.turn_to(name),
            None => self.tell("there is no run beyond this one".into()),
        }
    }

    fn list_runs(&mut self) {
        let shown = self.runs.iter().rev().position(|run| self.shows(&run.name));
        self.over = Over::Runs(shown.unwrap_or(0));
        self.look.runs = true;
    }

    fn show_samples(&mut self) {
        let some = self.run.as_ref().is_some_and(|run| !run.samples.is_empty());
        match some {
            true => self.over = Over::Samples(0),
            false => self.tell("this run has no samples".into()),
        }
    }

    /// Asks whether something is to be done, or says why it cannot be.
    fn ask(&mut self, action: Action) {
        let Some(run) = &self.run else {
            return self.tell("there is no run to do that to".into());
        };
        let (name, status) = (&run.info.name, run.info.status.as_str());
        let possible = match action {
            Action::Pause => matches!(status, "running" | "queued"),
            Action::Checkpoint => status == "running",
            Action::Resume => matches!(status, "paused" | "interrupted" | "failed" | "cancelled"),
            Action::Cancel => !matches!(status, "finished" | "cancelled"),
        };
        let refused = match (&self.link, possible) {
            (_, false) => {
                let verb = action.verb();
                format!("{name} is {status}; there is nothing to {verb}")
            }
            (Link::Live, true) => {
                self.over = Over::Question(action);
                return;
            }
            (Link::Lost(_), true) => "the coordinator does not answer".into(),
            (Link::Home(_), true) => {
                "no coordinator runs here; start `cohort coordinator` first".into()
            }
        };
        self.tell(refused);
    }
}

impl Action {
    /// What it is called.
    pub fn verb(self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::Checkpoint => "checkpoint",
            Self::Resume => "resume",
            Self::Cancel => "cancel",
        }
    }
}

fn next_axis(axis: Axis) -> Axis {
    match axis {
        Axis::Step => Axis::Tokens,
        Axis::Tokens => Axis::Time,
        Axis::Time => Axis::Step,
    }
}
