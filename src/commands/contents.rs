//! `cohort corpus head` and `cohort corpus stats`: looks at what is in a corpus, at the coordinator or in the home.

use anyhow::Result;
use cohort_common::api::{CorpusHead, CountedCorpus, HeadRequest};
use cohort_common::corpus::{Lengths, Share, Shares, SideStats, Split};
use cohort_common::spec::{human_bytes, human_count};
use cohort_coordinator::offline;

use crate::cli::{CorpusHeadArgs, CorpusStatsArgs, Side};
use crate::context::Context;
use crate::facts;
use crate::output::{one_line, table};

/// Columns of the longest bar of a histogram.
const BAR: u64 = 40;
/// Columns of a token that is listed.
const TOKEN: usize = 24;

/// Shows the first documents.
pub async fn head(args: CorpusHeadArgs) -> Result<()> {
    let request = HeadRequest {
        corpus: args.corpus,
        split: match args.split {
            Side::Train => Split::Train,
            Side::Validation => Split::Validation,
        },
        documents: args.documents,
        chars: args.chars,
    };
    let context = Context::of(&args.connect)?;
    let head = match context.connect_if_running().await? {
        Some(mut client) => client.head_corpus(&request).await?,
        None => offline::head(&context.home, &request)?,
    };
    let out = args.json.output();
    if out.json {
        return head
            .documents
            .iter()
            .try_for_each(|document| out.line(document));
    }
    out.say(documents(&head));
    Ok(())
}

/// Counts what is there.
pub async fn stats(args: CorpusStatsArgs) -> Result<()> {
    let context = Context::of(&args.connect)?;
    let counted = match context.connect_if_running().await? {
        Some(mut client) => client.count_corpus(&args.corpus).await?,
        None => offline::count(&context.home, &args.corpus)?,
    };
    let out = args.json.output();
    if out.json {
        return out.line(&counted);
    }
    out.say(counts(&counted));
    Ok(())
}

/// Documents in full, as far as they were asked for, each below a line that says what it is.
fn documents(head: &CorpusHead) -> String {
    let mut text = format!(
        "corpus {} ({}): {} of {} {} documents\n",
        head.name,
        facts::short(&head.fingerprint),
        head.documents.len(),
        head.of,
        head.split
    );
    for document in &head.documents {
        let mut line = format!("\n── {}", document.document);
        if let Some(source) = &document.source {
            line += &format!("  {source}");
        }
        if let Some(label) = &document.label {
            line += &format!("  label {label}");
        }
        line += &format!("  {} tokens", document.tokens);
        // What controls a terminal is shown, not obeyed.
        let shown = |c: char| match c {
            '\n' | '\t' => c,
            c if c.is_control() => '·',
            c => c,
        };
        let said: String = document
            .text
            .replace("\r\n", "\n")
            .chars()
            .map(shown)
            .collect();
        let more = if document.cut { " …" } else { "" };
        text += &format!("{line}\n{}{more}\n", said.trim_end_matches('\n'));
    }
    text
}

fn counts(counted: &CountedCorpus) -> String {
    let stats = &counted.stats;
    let mut lines = vec![
        format!(
            "corpus       {} ({})",
            stats.name,
            facts::short(&stats.fingerprint)
        ),
        format!("training     {}", side(&stats.train)),
        format!("validation   {}", side(&stats.validation)),
        format!(
            "vocabulary   {} tokens, {} of them unused",
            stats.vocab_size, stats.unused_tokens
        ),
    ];
    if let Some(summary) = &stats.selection {
        lines.push(format!("left out     {}", facts::left_out(summary)));
    }
    if stats.skipped > 0 {
        lines.push(format!("skipped      {} inputs", stats.skipped));
    }
    lines.push(format!(
        "\ntokens per training document\n{}",
        lengths(&stats.train.lengths)
    ));
    let head = ["token", "id", "count", "share"]
        .map(str::to_owned)
        .to_vec();
    let frequent = stats.frequent.iter().map(|token| {
        vec![
            format!("`{}`", one_line(&token.text, TOKEN)),
            token.id.to_string(),
            token.count.to_string(),
            percent(token.share),
        ]
    });
    let rows: Vec<_> = std::iter::once(head).chain(frequent).collect();
    lines.push(format!("\n{}", table(&rows)));
    for (what, shares) in [("group", &stats.groups), ("source", &stats.sources)] {
        if let Some(shares) = shares {
            lines.push(format!("\n{}", parts(what, shares)));
        }
    }
    let speed = counted.read_bytes as f64 / counted.seconds.max(1e-9);
    lines.push(format!(
        "\nread {} in {:.3} s, {}/s",
        human_bytes(counted.read_bytes),
        counted.seconds,
        human_bytes(speed as u64)
    ));
    lines.join("\n")
}

fn side(side: &SideStats) -> String {
    let mut text = format!(
        "{} documents, {}, {} tokens",
        side.documents,
        human_bytes(side.bytes),
        human_count(side.tokens)
    );
    if let Some(bytes) = side.bytes_per_token {
        text += &format!(", {bytes:.2} bytes per token");
    }
    text
}

/// Percentiles in one line, and a bar for each range.
fn lengths(lengths: &Lengths) -> String {
    let mut text = format!(
        "  {} to {}, mean {:.1}; 10 % up to {}, half up to {}, 90 % up to {}, 99 % up to {}",
        lengths.min,
        lengths.max,
        lengths.mean,
        lengths.p10,
        lengths.median,
        lengths.p90,
        lengths.p99
    );
    let most = lengths.histogram.iter().map(|range| range.documents).max();
    let most = most.unwrap_or(0).max(1);
    for range in &lengths.histogram {
        let bar = "█".repeat((range.documents * BAR).div_ceil(most) as usize);
        let (from, to) = (range.from, range.to);
        text += &format!("\n  {from:>10} to {to:<10} {:>10}  {bar}", range.documents);
    }
    text
}

/// Where the text came from, the largest parts first.
fn parts(what: &str, shares: &Shares) -> String {
    let head = [what, "documents", "text", "tokens", "share"];
    let row = |share: &Share| {
        vec![
            share.name.clone(),
            share.counts.documents.to_string(),
            human_bytes(share.counts.bytes),
            human_count(share.counts.tokens),
            percent(share.share),
        ]
    };
    let head = head.map(str::to_owned).to_vec();
    let rows: Vec<_> = std::iter::once(head)
        .chain(shares.largest.iter().map(row))
        .collect();
    let more = shares.count.saturating_sub(shares.largest.len() as u64);
    match more {
        0 => table(&rows),
        more => format!("{}\nand {more} more", table(&rows)),
    }
}

fn percent(share: f64) -> String {
    format!("{:.2} %", 100.0 * share)
}
