//! The watchdog of a run: what counts as a step out of the ordinary, and what becomes of it. The judgement itself is in
//! `cluster/watchdog.rs`.

use serde::{Deserialize, Serialize};

use super::bounds::{number, real, within};
use super::error::SpecError;
use super::file::WatchdogTable;

/// Applied steps that are needed before any step is judged.
pub const LEAST_HISTORY: u64 = 20;

/// What becomes of a step that is out of the ordinary.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WatchdogAction {
    /// It is applied, and people are told.
    #[default]
    Tell,
    /// It is committed without its update.
    Skip,
    /// As `skip`, and the run pauses.
    Pause,
    /// Nobody looks.
    Off,
}

impl WatchdogAction {
    /// Its word, as in a spec.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tell => "tell",
            Self::Skip => "skip",
            Self::Pause => "pause",
            Self::Off => "off",
        }
    }

    /// Whether it keeps an update from the weights.
    pub fn skips(self) -> bool {
        matches!(self, Self::Skip | Self::Pause)
    }
}

/// When a step is out of the ordinary, and what becomes of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WatchdogConfig {
    /// Standard deviations above the mean that are still ordinary.
    pub sigma: f64,
    /// Applied steps that mean and deviation are taken over.
    pub window: u64,
    /// What becomes of others.
    pub action: WatchdogAction,
}

impl WatchdogConfig {
    /// Applied steps that are needed before a step is judged.
    pub fn least_history(&self) -> u64 {
        (self.window / 2).max(LEAST_HISTORY)
    }
}

impl Default for WatchdogConfig {
    fn default() -> Self {
        Self {
            sigma: 6.0,
            window: 100,
            action: WatchdogAction::default(),
        }
    }
}

impl std::fmt::Display for WatchdogConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let does = match self.action {
            WatchdogAction::Tell => "is told",
            WatchdogAction::Skip => "is skipped",
            WatchdogAction::Pause => "is skipped and pauses the run",
            WatchdogAction::Off => return f.write_str("off"),
        };
        write!(
            f,
            "a step {} deviations above the last {} {does}",
            number(self.sigma),
            self.window
        )
    }
}

/// The watchdog that a table asks for.
pub(super) fn watchdog_of(table: &WatchdogTable) -> Result<WatchdogConfig, SpecError> {
    let default = WatchdogConfig::default();
    let sigma = table.sigma.unwrap_or(default.sigma);
    real(
        "watchdog.sigma",
        sigma,
        sigma > 0.0 && sigma <= 1e6,
        "it must be above 0, and at most 1000000",
        "6 is the default; 3 finds much that is ordinary",
    )?;
    let window = table.window.unwrap_or(default.window);
    within(
        "watchdog.window",
        window,
        LEAST_HISTORY..=10_000,
        "100 is the default",
    )?;
    Ok(WatchdogConfig {
        sigma,
        window,
        action: table.action.unwrap_or_default(),
    })
}
