//! The words of the live stream: server-sent events, a name and JSON each.

use cohort_common::api::{RunEvent, StepEvent, TimelineEntry};
use serde::Serialize;
use serde_json::json;

use crate::store::EventRow;
use crate::view::told;

/// Steps in one message, at most.
const STEPS: usize = 512;

/// A line without meaning: the connection lives.
pub const ALIVE: &str = ": alive\n\n";

/// A step, and when it was committed.
#[derive(Serialize)]
struct TimedStep {
    #[serde(flatten)]
    step: StepEvent,
    time_ms: u64,
}

#[derive(Serialize)]
struct Told<'a> {
    run: &'a str,
    entry: TimelineEntry,
}

/// One message.
pub fn of_event(name: &str, data: &impl Serialize) -> String {
    let json = serde_json::to_string(data).expect("what is shown is plain data");
    // JSON has no line breaks of its own, so that one line of data is enough.
    format!("event: {name}\ndata: {json}\n\n")
}

/// Says which event is the newest that was told, so that whoever comes back can go on after it.
pub fn position(id: u64) -> String {
    format!("id: {id}\n\n")
}

/// Says that more has happened to a run than was told: its history is to be asked for anew.
pub fn reload(run: &str) -> String {
    of_event("reload", &json!({ "run": run }))
}

/// What happened to a run, in order; steps that follow each other are put together.
pub fn of_rows(run: &str, rows: Vec<EventRow>) -> String {
    let mut out = String::new();
    let mut steps = Vec::new();
    for row in rows {
        let time_ms = row.time_ms;
        // One that cannot be read is of another version; nothing is known of it.
        let Ok(event) = serde_json::from_str(&row.text) else {
            continue;
        };
        if let RunEvent::Step(step) = event {
            steps.push(TimedStep { step, time_ms });
            if steps.len() == STEPS {
                flush(&mut steps, &mut out);
            }
            continue;
        }
        flush(&mut steps, &mut out);
        out += &match event {
            RunEvent::Eval(eval) => of_event("eval", &eval),
            RunEvent::Sample(sample) => of_event("sample", &sample),
            _ => match told(row) {
                Some(entry) => of_event("timeline", &Told { run, entry }),
                None => continue,
            },
        };
    }
    flush(&mut steps, &mut out);
    out
}

fn flush(steps: &mut Vec<TimedStep>, out: &mut String) {
    if !steps.is_empty() {
        *out += &of_event("steps", steps);
        steps.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(id: u64, event: &RunEvent) -> EventRow {
        EventRow {
            id,
            run: Some("tiny-1".into()),
            time_ms: 7,
            kind: event.kind().into(),
            text: serde_json::to_string(event).unwrap(),
        }
    }

    fn step(step: u64) -> RunEvent {
        RunEvent::Step(StepEvent {
            run: "tiny-1".into(),
            step,
            steps: 2000,
            loss: 1.0,
            grad_norm: 1.0,
            learning_rate: 0.1,
            tokens: 1,
            tokens_per_second: 1.0,
            epoch: 0.0,
            bits_per_byte: None,
            mfu: None,
            skipped: false,
        })
    }

    #[test]
    fn steps_are_put_together_up_to_a_bound_and_order_is_kept() {
        let note = RunEvent::Note {
            run: "tiny-1".into(),
            text: "two\nlines".into(),
        };
        let mut rows: Vec<EventRow> = (1..=600).map(|n| row(n, &step(n))).collect();
        rows.push(row(601, &note));
        rows.push(EventRow {
            text: "{}".into(),
            ..row(602, &note)
        });
        rows.push(row(603, &step(601)));
        let text = of_rows("tiny-1", rows);
        let messages: Vec<(&str, serde_json::Value)> = text
            .split_terminator("\n\n")
            .map(|message| {
                let (name, data) = message.split_once('\n').unwrap();
                let data = data.strip_prefix("data: ").unwrap();
                (name, serde_json::from_str(data).unwrap())
            })
            .collect();
        let shape: Vec<_> = messages
            .iter()
            .map(|(name, data)| (*name, data.as_array().map(Vec::len)))
            .collect();
        assert_eq!(
            shape,
            [
                ("event: steps", Some(512)),
                ("event: steps", Some(88)),
                ("event: timeline", None),
                ("event: steps", Some(1))
            ]
        );
        assert_eq!(messages[0].1[0]["time_ms"], 7);
        assert_eq!(messages[0].1[0]["run"], "tiny-1");
        assert_eq!(messages[2].1["run"], "tiny-1");
        assert_eq!(messages[2].1["entry"]["text"], "two\nlines");
    }
}
