//! `cohort watch`: a run and its cluster in the terminal.
//!
//! In reading order: `state` (what is known, and how news change it), `keys` (what keys do), `draw` (what is seen), all
//! three **pure**; then `feed` (where news come from), `screen` (the terminal), and this file, which brings them together.
//! Leaving the dashboard never stops a run.

mod draw;
mod feed;
mod keys;
mod screen;
mod state;
#[cfg(test)]
mod tests;

use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use ratatui::crossterm::event::{self, Event};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};

use self::draw::Theme;
use self::feed::Feed;
use self::keys::Intent;
use self::screen::Screen;
use self::state::State;
use crate::context::Context;
use crate::local;
use crate::output::now_ms;
use crate::source::Source;

/// Between two pictures, at least.
const FRAME: Duration = Duration::from_millis(250);
/// How soon the thread that reads keys notices that nobody wants them any more.
const KEYS_LOOK: Duration = Duration::from_millis(100);
/// News and keys that wait.
const WAITING: usize = 256;

/// Shows a run, or else the active one, or else the newest, until somebody leaves. Tells what to say then.
pub async fn run(context: Context, run: Option<String>) -> Result<String> {
    let mut source = open(&context).await?;
    if let Some(run) = &run {
        // An unknown name is an error before anything is drawn.
        source.view(run).await?;
    }
    let mut state = State::new(run, feed::link(&source), now_ms());
    let (look, looks) = watch::channel(state.look.clone());
    let (asks, asked) = mpsc::channel(WAITING);
    let (news, mut arrived) = mpsc::channel(WAITING);
    let feed = Feed {
        context,
        source: Some(source),
        look: looks,
        asks: asked,
        news,
    };
    let feed = tokio::spawn(feed.run());
    let mut screen = Screen::take()?;
    let mut keys = keys();
    let theme = Theme::of_environment();
    let mut next_frame = Instant::now();
    let mut ended = std::pin::pin!(local::interrupt());
    loop {
        tokio::select! {
            () = &mut ended => break,
            key = keys.recv() => match key {
                Some(Event::Key(key)) => match state.press(key) {
                    Some(Intent::Quit) => break,
                    Some(Intent::Act(action, run)) => asks.send((action, run)).await?,
                    None => {}
                },
                Some(_) => state.touch(),
                // The terminal is gone.
                None => break,
            },
            piece = arrived.recv() => match piece {
                Some(piece) => state.take(piece),
                None => break,
            },
            () = sleep_until(next_frame), if state.has_changed() => {
                state.take_changed();
                draw(&mut screen, &mut state, theme)?;
                next_frame = Instant::now() + FRAME;
            }
        }
        look.send_if_modified(|look| {
            let other = *look != state.look;
            look.clone_from(&state.look);
            other
        });
    }
    drop(screen);
    if feed.is_finished() {
        feed.await.context("the dashboard's data have ended")?;
    }
    Ok(farewell(&state))
}

/// A coordinator if one runs, else the home directory.
async fn open(context: &Context) -> Result<Source> {
    let mut source = Source::found(context).await?;
    let rests = matches!(source, Source::Home(_));
    match rests && source.runs().await?.is_empty() {
        true => Err(anyhow!(
            "no coordinator runs, and there are no runs in `{}` yet; `cohort pretrain` makes one",
            context.home.display()
        )),
        false => Ok(source),
    }
}

fn draw(screen: &mut Screen, state: &mut State, theme: Theme) -> Result<()> {
    let drawn = screen.draw(|frame| {
        state.widen(draw::dots(frame.area()));
        draw::dashboard(frame, state, theme);
    });
    drawn.context("cannot write to the terminal")
}

/// Keys and changes of size, from a thread of its own: reading a terminal blocks.
fn keys() -> mpsc::Receiver<Event> {
    let (sender, receiver) = mpsc::channel(WAITING);
    std::thread::spawn(move || {
        while !sender.is_closed() {
            let sent = match event::poll(KEYS_LOOK) {
                Ok(false) => continue,
                Ok(true) => event::read().is_ok_and(|event| sender.blocking_send(event).is_ok()),
                Err(_) => false,
            };
            if !sent {
                return;
            }
        }
    });
    receiver
}

/// What is said when the dashboard is left.
fn farewell(state: &State) -> String {
    let Some(run) = &state.run else {
        return "left; nothing was stopped".into();
    };
    let (name, status) = (&run.info.name, &run.info.status);
    match status.as_str() {
        "running" | "queued" => {
            format!("left {name}, which goes on; `cohort watch {name}` comes back to it")
        }
        _ => format!("left {name}, which is {status}"),
    }
}
