//! Figures of made-up workers.

use cohort_common::process::Usage;

use super::*;

const RUN: &str = "tiny-1";

fn info() -> MemberInfo {
    MemberInfo {
        host: "host".into(),
        pid: 7,
        device: "cpu".into(),
        threads: 1,
        fingerprint: "f".into(),
        listens: None,
        site: None,
    }
}

/// A worker that works alike in every second.
struct Life {
    session: SessionId,
    each_second: Counters,
}

impl Life {
    fn said(&self, run: Option<&str>, second: u64) -> Figures {
        let each = self.each_second;
        Figures {
            run: run.map(|run| (RunId::new(run), second)),
            counters: Counters {
                compute_us: each.compute_us * second,
                exchange_us: each.exchange_us * second,
                wait_us: each.wait_us * second,
                data_us: each.data_us * second,
                tokens: each.tokens * second,
                steps: each.steps * second,
                lanes: each.lanes * second,
                lanes_us: each.lanes_us * second,
                sent_bytes: each.sent_bytes * second,
                received_bytes: each.received_bytes * second,
            },
            usage: Some(Usage {
                rss_bytes: 1 << 20,
                cpu_us: second * 500_000,
            }),
        }
    }
}

fn worker(number: u64, compute_ms: u64, lanes: u64) -> Life {
    Life {
        session: SessionId(number),
        each_second: Counters {
            compute_us: compute_ms * 1000,
            wait_us: (1000 - compute_ms) * 1000,
            tokens: 100 * lanes,
            steps: 1,
            lanes,
            lanes_us: compute_ms * 1000,
            ..Counters::default()
        },
    }
}

fn second(start: Instant, second: u64) -> Instant {
    start + Duration::from_secs(second)
}

/// A book of these workers after some seconds in a run.
fn book(lives: &[Life], start: Instant, seconds: u64) -> Book {
    let mut book = Book::default();
    for life in lives {
        book.joined(life.session, &info(), Some(1e9), start);
    }
    for s in 0..=seconds {
        for life in lives {
            book.heard(life.session, life.said(Some(RUN), s), second(start, s));
        }
    }
    book
}

fn view(book: &Book, number: u64, now: Instant) -> WorkerView {
    let mut view = WorkerView::default();
    book.show(SessionId(number), &mut view, Some(1e6), now);
    let late = book.straggler(now).filter(|(s, _)| s.0 == number);
    view.straggler = late.map(|(_, why)| why);
    view
}

#[test]
fn a_view_tells_of_the_newest_seconds() {
    let start = Instant::now();
    let life = worker(1, 750, 4);
    let mut book = book(&[worker(1, 750, 4)], start, 20);
    let seen = view(&book, 1, second(start, 20));
    assert_eq!(seen.tokens_per_second, Some(400.0));
    let times = seen.times.expect("it has worked");
    assert_eq!((times.compute, times.wait), (0.75, 0.25));
    assert_eq!((times.exchange, times.data), (0.0, 0.0));
    assert_eq!(seen.peak_flops, Some(1e9));
    assert_eq!(seen.mfu, Some(0.4));
    assert_eq!(seen.cores, Some(0.5));
    assert_eq!(seen.rss_bytes, Some(1 << 20));
    assert_eq!(seen.sent_per_second, None, "nothing was sent");
    assert_eq!(seen.straggler, None, "it is alone");
    // From here on it does nothing; ten seconds later nothing else is seen.
    for s in 21..=31 {
        let mut said = life.said(Some(RUN), 20);
        said.counters.wait_us += (s - 20) * 1_000_000;
        book.heard(SessionId(1), said, second(start, s));
    }
    let seen = view(&book, 1, second(start, 31));
    assert_eq!(seen.tokens_per_second, Some(0.0));
    assert_eq!(seen.times.map(|t| t.wait), Some(1.0));
    // And one that says nothing has no present.
    let seen = view(&book, 1, second(start, 40));
    assert_eq!((seen.tokens_per_second, seen.times), (None, None));
    assert_eq!(seen.peak_flops, Some(1e9));
}

#[test]
fn the_others_wait_for_a_straggler() {
    let start = Instant::now();
    let now = second(start, 9);
    let of = |lives: &[Life]| {
        let book = book(lives, start, 9);
        let all = lives.iter().filter_map(|life| {
            let number = life.session.0;
            view(&book, number, now).straggler.map(|why| (number, why))
        });
        all.collect::<Vec<_>>()
    };
    assert_eq!(
        of(&[worker(1, 500, 2), worker(2, 900, 2), worker(3, 500, 2)]),
        [(
            2,
            "its lanes take 1.8 times as long as those of the others".into()
        )]
    );
    // Slower, but it has fewer lanes for that.
    assert_eq!(of(&[worker(1, 900, 3), worker(2, 920, 1)]), []);
    // Lanes that do not divide evenly are nobody's fault.
    assert_eq!(of(&[worker(1, 900, 2), worker(2, 450, 1)]), []);
    assert_eq!(of(&[worker(1, 900, 2)]), []);
}

#[test]
fn a_straggler_that_waits_for_text_is_told_so() {
    let start = Instant::now();
    let mut late = worker(2, 400, 2);
    late.each_second.data_us = 500_000;
    late.each_second.wait_us = 100_000;
    late.each_second.lanes_us = 900_000;
    let book = book(&[worker(1, 400, 2), late], start, 9);
    let why = view(&book, 2, second(start, 9)).straggler;
    assert_eq!(
        why.as_deref(),
        Some(
            "its lanes take 2.2 times as long as those of the others: it waits for text for 50 % of its time"
        )
    );
}

#[test]
fn rows_add_up_to_what_was_done_in_the_run() {
    let start = Instant::now();
    let life = worker(1, 750, 4);
    let mut book = Book::default();
    book.joined(life.session, &info(), None, start);
    let mut rows = Vec::new();
    // Before the run, in it, and after it.
    for s in 0..60 {
        let run = (5..=37).contains(&s).then_some(RUN);
        rows.extend(book.heard(life.session, life.said(run, s), second(start, s)));
    }
    let steps: Vec<u64> = rows.iter().map(|due| due.row.step).collect();
    assert_eq!(steps, [15, 25, 35, 37]);
    assert!(rows.iter().all(|due| due.run == RunId::new(RUN)));
    assert_eq!(rows.iter().map(|due| due.row.tokens).sum::<u64>(), 32 * 400);
    let compute: u64 = rows.iter().map(|due| due.row.compute_us).sum();
    assert_eq!(compute, 32 * 750_000);
    assert_eq!(rows[0].row.worker, "w1");
}

#[test]
fn a_second_row_of_a_step_holds_the_first() {
    let start = Instant::now();
    let life = worker(1, 750, 4);
    let mut book = Book::default();
    book.joined(life.session, &info(), None, start);
    let said = |s: u64, step: u64| Figures {
        run: Some((RunId::new(RUN), step)),
        ..life.said(None, s)
    };
    book.heard(life.session, said(0, 0), start);
    book.heard(life.session, said(3, 2), second(start, 3));
    let rested = book.rests(&RunId::new(RUN), second(start, 3));
    assert_eq!(rested.len(), 1);
    assert_eq!((rested[0].row.step, rested[0].row.tokens), (2, 1200));
    assert_eq!(book.rests(&RunId::new(RUN), second(start, 3)), []);
    assert_eq!(book.rests(&RunId::new("other"), second(start, 3)), []);
    // What it says of its last moments comes after that.
    book.heard(life.session, said(4, 2), second(start, 4));
    let last = book.left(life.session, second(start, 4)).expect("a row");
    assert_eq!((last.row.step, last.row.tokens), (2, 1600));
    assert_eq!(book.left(life.session, start), None);
}

#[test]
fn peaks_add_up_if_all_are_known() {
    let start = Instant::now();
    let mut book = Book::default();
    book.joined(SessionId(1), &info(), Some(1e9), start);
    book.joined(SessionId(2), &info(), Some(2e9), start);
    book.joined(SessionId(3), &info(), None, start);
    assert_eq!(book.peak_of([SessionId(1), SessionId(2)]), Some(3e9));
    assert_eq!(book.peak_of([SessionId(1), SessionId(3)]), None);
    assert_eq!(book.peak_of([]), None);
}
