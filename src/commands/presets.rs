//! `cohort presets`: lists the recipes that come with Cohort, or prints one.

use anyhow::Result;
use cohort_common::spec::{PRESETS, Preset, human_bytes, human_count, memory_per_worker};

use crate::cli::PresetsArgs;
use crate::output::table;

/// A preset and what it takes.
#[derive(serde::Serialize)]
struct Row {
    name: &'static str,
    summary: &'static str,
    parameters: u64,
    memory_bytes: u64,
    tokens_per_step: u64,
    steps: u64,
}

/// Runs the verb.
pub fn run(args: &PresetsArgs) -> Result<()> {
    let out = args.json.output();
    if let Some(name) = &args.name {
        let preset = Preset::find(name)?;
        match out.json {
            true => out.line(&row(preset)?)?,
            false => out.say(preset.toml),
        }
        return Ok(());
    }
    let rows: Vec<Row> = PRESETS.iter().map(row).collect::<Result<_>>()?;
    if out.json {
        return rows.iter().try_for_each(|row| out.line(row));
    }
    let heading = [
        "preset",
        "parameters",
        "memory per worker",
        "tokens per step",
        "steps",
        "what for",
    ];
    let mut lines = vec![heading.map(String::from).to_vec()];
    for row in rows {
        lines.push(vec![
            row.name.into(),
            human_count(row.parameters),
            human_bytes(row.memory_bytes),
            row.tokens_per_step.to_string(),
            row.steps.to_string(),
            row.summary.into(),
        ]);
    }
    out.say(table(&lines));
    Ok(())
}

fn row(preset: &Preset) -> Result<Row> {
    let meant = preset.source()?.into_file()?.validate()?;
    let model = meant.assumed_model();
    let memory = memory_per_worker(&model, &meant.train);
    Ok(Row {
        name: preset.name,
        summary: preset.summary,
        parameters: memory.parameters,
        memory_bytes: memory.total_bytes(),
        tokens_per_step: meant.train.samples_per_step() * model.context as u64,
        steps: meant.train.steps,
    })
}
