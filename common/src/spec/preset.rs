//! Recipes that come with the binary. Each is a spec file like a user's, so that it can be printed, copied and changed.

use super::error::SpecError;
use super::file::SpecSource;
use super::suggest::nearest_word;

/// A named spec.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preset {
    /// What `--preset` takes.
    pub name: &'static str,
    /// One line on what it is for.
    pub summary: &'static str,
    /// The spec, in TOML, with comments.
    pub toml: &'static str,
}

/// All presets, the smallest first.
pub const PRESETS: &[Preset] = &[
    Preset {
        name: "tiny",
        summary: "a llama that trains in seconds, to see that everything works",
        toml: include_str!("../../presets/tiny.toml"),
    },
    Preset {
        name: "shakespeare-quick",
        summary: "a character model of Shakespeare in less than half a minute",
        toml: include_str!("../../presets/shakespeare-quick.toml"),
    },
    Preset {
        name: "nanogpt-shakespeare-cpu",
        summary: "nanoGPT's character model of Shakespeare for a CPU, 4 layers",
        toml: include_str!("../../presets/nanogpt-shakespeare-cpu.toml"),
    },
    Preset {
        name: "shakespeare-cpu",
        summary: "a character model of Shakespeare that beats n-grams in minutes",
        toml: include_str!("../../presets/shakespeare-cpu.toml"),
    },
    Preset {
        name: "small",
        summary: "a llama of 6 layers, for a few books on a few cores",
        toml: include_str!("../../presets/small.toml"),
    },
    Preset {
        name: "gpt2",
        summary: "GPT-2 with 124 million parameters; wants GPUs or patience",
        toml: include_str!("../../presets/gpt2.toml"),
    },
];

impl Preset {
    /// The preset of that name.
    pub fn find(name: &str) -> Result<&'static Self, SpecError> {
        PRESETS.iter().find(|p| p.name == name).ok_or_else(|| {
            let names: Vec<&str> = PRESETS.iter().map(|p| p.name).collect();
            SpecError::UnknownPreset {
                name: name.into(),
                hint: match nearest_word(name, &names) {
                    Some(near) => format!("did you mean `{near}`?"),
                    None => format!("there are {}", names.join(", ")),
                },
            }
        })
    }

    /// The preset as a spec that overrides can be applied to.
    pub fn source(&self) -> Result<SpecSource, SpecError> {
        SpecSource::parse(&format!("preset {}", self.name), self.toml)
    }
}
