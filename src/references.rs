//! From a reference such as `RUN@best`, a directory or `hf://OWNER/NAME` to files on this machine's disk: by the
//! coordinator where one is given or runs, else by reading the home directory. What lies on another machine is downloaded
//! once.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use cohort_common::api::{CheckpointInfo, Resolved};
use cohort_common::checkpoint::{CONFIG, Checkpoint, LEDGER, MANIFEST, OPTIMIZER, RUN};
use cohort_common::home::{CheckpointRef, Home};

use crate::client::Client;
use crate::context::Context;
use crate::failure::hinted;
use crate::follow::Bar;
use crate::hub;

/// A checkpoint on this machine.
pub struct Found {
    /// What to call it.
    pub name: String,
    /// Where it lies.
    pub directory: PathBuf,
    /// Where the adapters lie that are put on it, if any are: what to call them, and the directory.
    adapter: Option<(String, PathBuf)>,
}

impl Found {
    fn new(name: String, directory: PathBuf) -> Self {
        Self {
            name,
            directory,
            adapter: None,
        }
    }

    /// Opens it, with the adapters that are put on it.
    pub fn open(&self) -> Result<Checkpoint> {
        let checkpoint = Checkpoint::open(&self.directory)?;
        let Some((adapter, directory)) = &self.adapter else {
            return Ok(checkpoint);
        };
        let adapted = checkpoint.with_adapter(directory);
        adapted.with_context(|| format!("the adapters {adapter} cannot be put on the base"))
    }
}

/// Finds the checkpoint that `reference` means, and the adapters to put on it.
pub async fn find_with(context: &Context, reference: &str, adapter: Option<&str>) -> Result<Found> {
    let base = find(context, reference).await?;
    let Some(adapter) = adapter else {
        return Ok(base);
    };
    if let CheckpointRef::Hub(_) = parse(adapter)? {
        bail!(
            "`{adapter}`: adapters are not downloaded from the hub; name a directory with them, or a run"
        );
    }
    let adapter = find(context, adapter).await?;
    Ok(Found {
        name: format!("{} with {}", base.name, adapter.name),
        directory: base.directory,
        adapter: Some((adapter.name, adapter.directory)),
    })
}

/// Finds the checkpoint that `reference` means.
pub async fn find(context: &Context, reference: &str) -> Result<Found> {
    let parsed = parse(reference)?;
    if let Some(found) = outside(&parsed).await? {
        return Ok(found);
    }
    let reference = parsed.to_string();
    match context.connect_if_running().await? {
        Some(mut client) => {
            let resolved = client.resolve(&reference).await?;
            fetched(context, &client, &resolved).await
        }
        None => {
            let resolved = cohort_coordinator::offline::resolve(&context.home, &reference)?;
            Ok(Found::new(
                name_of(&resolved),
                resolved.checkpoint.path.into(),
            ))
        }
    }
}

/// The checkpoint that no coordinator keeps: a directory, or a model of the hub; `None` for one of a run.
pub async fn outside(reference: &CheckpointRef) -> Result<Option<Found>> {
    let directory = match reference {
        CheckpointRef::Directory(directory) => expand_home(directory),
        CheckpointRef::Hub(model) => hub::fetch(model).await?,
        CheckpointRef::Run { .. } => return Ok(None),
    };
    Ok(Some(Found::new(reference.to_string(), directory)))
}

/// Understands a reference. A bare word that is a directory here and no run is probably meant as that directory.
pub fn parse(reference: &str) -> Result<CheckpointRef> {
    reference.parse().map_err(|error| {
        let error = anyhow::Error::new(error);
        match Path::new(reference).is_dir() {
            true => hinted(
                format!("{error}"),
                format!("write `./{reference}` for the directory"),
            ),
            false => error,
        }
    })
}

/// What a resolved checkpoint is called.
pub fn name_of(resolved: &Resolved) -> String {
    format!("{}@{}", resolved.run, resolved.checkpoint.step)
}

/// `~` at the beginning is the user's directory.
pub fn expand_home(path: &Path) -> PathBuf {
    match (path.strip_prefix("~"), directories::BaseDirs::new()) {
        (Ok(rest), Some(dirs)) => dirs.home_dir().join(rest),
        _ => path.to_path_buf(),
    }
}

/// The files of a checkpoint that a coordinator keeps: in its place if that is this machine's disk, else downloaded.
async fn fetched(context: &Context, client: &Client, resolved: &Resolved) -> Result<Found> {
    let name = name_of(resolved);
    let here = PathBuf::from(&resolved.checkpoint.path);
    if client.same_home() && here.is_dir() {
        return Ok(Found::new(name, here));
    }
    let home = Home::open(&context.home)?;
    let directory = cache_directory(&home, &resolved.checkpoint);
    if !directory.join(CONFIG).exists() {
        download(client, resolved, &directory).await?;
    }
    Ok(Found::new(name, directory))
}

fn cache_directory(home: &Home, checkpoint: &CheckpointInfo) -> PathBuf {
    let step = format!("step-{}", checkpoint.step);
    let state = checkpoint
        .state_hash
        .chars()
        .filter(char::is_ascii_alphanumeric)
        .take(16);
    let state: String = state.collect();
    home.root()
        .join("downloads")
        .join(format!("{step}-{state}"))
}

/// Downloads what others read of a checkpoint: no moments, so no manifest either.
async fn download(client: &Client, resolved: &Resolved, directory: &Path) -> Result<()> {
    let (run, step) = (resolved.run.as_str(), resolved.checkpoint.step);
    let mut data = client.data().await?;
    let mut files = data.checkpoint_files(run, step).await?;
    let ours = [OPTIMIZER, RUN, LEDGER, MANIFEST];
    files.retain(|file| !ours.contains(&file.name.as_str()));
    let part = directory.with_extension("part");
    let cannot_write = || format!("cannot write `{}`", part.display());
    tokio::fs::create_dir_all(&part)
        .await
        .with_context(cannot_write)?;
    let bar = Bar::bytes("downloading", files.iter().map(|file| file.bytes).sum());
    for file in &files {
        let target = part.join(&file.name);
        data.fetch((run, step), file, &target, &|bytes| bar.advance(bytes))
            .await?;
    }
    bar.clear();
    let _ = tokio::fs::remove_dir_all(directory).await;
    tokio::fs::rename(&part, directory)
        .await
        .with_context(cannot_write)
}
