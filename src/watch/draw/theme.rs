//! Colours, sparingly: the sixteen of the terminal, so that they fit its own. With `NO_COLOR` there is only bold, faint
//! and reversed, and everything that a colour says is said by a sign as well.

use ratatui::style::{Color, Modifier, Style};

/// How things look.
#[derive(Clone, Copy, Debug)]
pub struct Theme {
    color: bool,
}

/// What a thing is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Ordinary text.
    Plain,
    /// What matters most.
    Strong,
    /// What matters least.
    Faint,
    /// As it should be.
    Good,
    /// Worth a look.
    Warning,
    /// Wrong.
    Bad,
    /// Training.
    Train,
    /// The lowest and highest values of training.
    Band,
    /// Validation.
    Validation,
    /// Validation on the corpus of the base.
    Base,
    /// A worker computes.
    Compute,
    /// A worker sends or receives.
    Exchange,
    /// A worker waits for text.
    Data,
    /// A worker waits for others.
    Wait,
    /// The marked line of a list, or the message at the foot.
    Marked,
}

impl Theme {
    /// With or without colours.
    pub fn new(color: bool) -> Self {
        Self { color }
    }

    /// As the environment wants it: `NO_COLOR` with any text means none.
    pub fn of_environment() -> Self {
        let none = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self::new(!none)
    }

    /// The style of a thing.
    pub fn style(self, role: Role) -> Style {
        let style = Style::new().add_modifier(match role {
            Role::Strong | Role::Bad => Modifier::BOLD,
            Role::Faint | Role::Band | Role::Wait => Modifier::DIM,
            Role::Marked => Modifier::REVERSED,
            _ => Modifier::empty(),
        });
        let color = match role {
            Role::Plain | Role::Strong | Role::Faint | Role::Marked | Role::Wait => return style,
            Role::Good | Role::Compute => Color::Green,
            Role::Warning | Role::Data => Color::Yellow,
            Role::Bad => Color::Red,
            Role::Train | Role::Band => Color::Cyan,
            Role::Validation => Color::Yellow,
            Role::Base => Color::Magenta,
            Role::Exchange => Color::Blue,
        };
        match self.color {
            true => style.fg(color),
            false => style,
        }
    }
}
