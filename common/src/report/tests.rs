//! Pictures as they come out.

use insta::assert_snapshot;
use proptest::prelude::*;

use super::ticks::{Ticks, number};
use super::*;

/// A transfer: a model from nothing, and two from the weights of another.
fn transfer() -> Chart {
    let curve = |name: &str, start: f64, end: f64, rate: f64| Series {
        name: name.into(),
        points: (0..=12)
            .map(|i| {
                let step = f64::from(i) * 50.0;
                (step, end + (start - end) * (-step / rate).exp())
            })
            .collect(),
        ..Series::default()
    };
    Chart {
        title: "Validation loss on tales/".into(),
        x_label: "step".into(),
        y_label: "nats per token".into(),
        series: vec![
            curve("from scratch", 8.3, 3.4, 120.0),
            curve("from books-1@2000, LoRA", 4.1, 3.3, 150.0),
            curve("from books-1@2000", 4.1, 3.05, 180.0),
        ],
        levels: vec![Level {
            name: "books-1@2000 as it was".into(),
            y: 4.1,
        }],
        ..Chart::default()
    }
}

#[test]
fn a_chart_as_svg() {
    assert_snapshot!(transfer().svg());
}

#[test]
fn a_png_has_the_size_that_was_asked_for() {
    let size = |png: &[u8]| {
        assert_eq!(&png[..8], b"\x89PNG\r\n\x1a\n");
        let number = |at: usize| u32::from_be_bytes(png[at..at + 4].try_into().expect("four"));
        (number(16), number(20))
    };
    assert_eq!(size(&transfer().png(1)), (960, 540));
    assert_eq!(size(&transfer().png(2)), (1920, 1080));
    assert_eq!(size(&transfer().png(0)), (960, 540));
    assert_eq!(transfer().png(1), transfer().png(1));
}

/// The rows of a PNG as this module writes it.
fn rows(png: &[u8]) -> Vec<u8> {
    let length = u32::from_be_bytes(png[33..37].try_into().expect("four")) as usize;
    assert_eq!(&png[37..41], b"IDAT");
    let mut rows = Vec::new();
    let mut decoder = flate2::read::ZlibDecoder::new(&png[41..41 + length]);
    std::io::Read::read_to_end(&mut decoder, &mut rows).expect("zlib");
    rows
}

#[test]
fn a_png_shows_something_in_every_colour() {
    let rows = rows(&transfer().png(1));
    assert_eq!(rows.len(), 540 * (1 + 3 * 960));
    let pixels: Vec<&[u8]> = rows
        .chunks_exact(1 + 3 * 960)
        .flat_map(|row| row[1..].chunks_exact(3))
        .collect();
    let count = |color: [u8; 3]| pixels.iter().filter(|pixel| **pixel == color).count();
    assert!(count([0xff; 3]) > pixels.len() * 8 / 10);
    for color in [[0x1f, 0x6f, 0xb4], [0xc8, 0x4b, 0x11], [0x1d, 0x80, 0x4a]] {
        assert!(count(color) > 300, "{color:?}: {}", count(color));
    }
}

#[test]
fn charts_with_little_in_them_are_drawn() {
    let empty = Chart::default();
    assert!(empty.svg().contains("no values"));
    assert!(!empty.png(1).is_empty());
    let nothing = Series {
        name: "diverged".into(),
        points: vec![(0.0, f64::NAN), (1.0, f64::INFINITY)],
        ..Series::default()
    };
    let one = Series {
        name: "one & <only>".into(),
        points: vec![(100.0, 2.0)],
        ..Series::default()
    };
    let chart = Chart {
        title: "x".repeat(300),
        series: vec![nothing, one],
        ..Chart::default()
    };
    let svg = chart.svg();
    assert!(svg.contains("one &amp; &lt;only&gt; 2.000"), "{svg}");
    assert!(!svg.contains("NaN") && !svg.contains("inf") && !svg.contains("diverged"));
    assert!(svg.contains("xxx…</text>"), "{svg}");
}

#[test]
fn a_gap_parts_a_curve() {
    let chart = Chart {
        series: vec![Series {
            name: "gap".into(),
            points: vec![
                (0.0, 1.0),
                (1.0, 2.0),
                (2.0, f64::NAN),
                (3.0, 1.0),
                (4.0, 2.0),
            ],
            ..Series::default()
        }],
        ..Chart::default()
    };
    let svg = chart.svg();
    assert_eq!(svg.matches("stroke-width=\"2\"").count(), 2, "{svg}");
}

/// A run on a logarithmic axis, with a band, a validation and something that happened.
fn run() -> Chart {
    let means: Vec<(f64, f64)> = (1..=60)
        .map(|step| (f64::from(step), 8.0 / f64::from(step)))
        .collect();
    let band = means.iter().map(|(x, y)| (*x, y * 0.8, y * 1.5));
    Chart {
        title: "books-1".into(),
        x_label: "step".into(),
        y_label: "loss (nats)".into(),
        log: true,
        series: vec![
            Series {
                name: "training".into(),
                band: band.collect(),
                points: means,
                ..Series::default()
            },
            Series {
                name: "validation".into(),
                points: vec![(0.0, 0.0), (20.0, 0.5), (40.0, 0.3)],
                color: Some(0),
                dashed: true,
                ..Series::default()
            },
        ],
        moments: ["w3 lost", "w2 lost", "taken up", "unseen"]
            .into_iter()
            .zip([20.0, 22.0, 40.0, 200.0])
            .map(|(name, x)| Moment {
                name: name.into(),
                x,
            })
            .collect(),
        ..Chart::default()
    }
}

#[test]
fn bands_moments_and_a_logarithmic_axis_are_drawn() {
    let svg = run().svg();
    assert_eq!(svg.matches("<polygon").count(), 1);
    // The second name would run into the first, and the last lies outside.
    assert!(svg.contains("w3 lost</text>") && svg.contains("taken up</text>"));
    assert!(!svg.contains("w2 lost") && !svg.contains("unseen"));
    assert_eq!(svg.matches("stroke-dasharray=\"2 3\"").count(), 3);
    // The validation has the colour of its run, and the value that a logarithm does not take is a gap.
    assert_eq!(svg.matches("stroke-dasharray=\"7 4\"").count(), 1);
    assert!(!svg.contains("#c84b11") && !svg.contains("NaN") && !svg.contains("inf"));
    for label in ["0.1", "0.2", "0.5", "1", "2", "5", "10", "20"] {
        assert!(svg.contains(&format!(">{label}</text>")), "{label}: {svg}");
    }
    let below_zero = Chart {
        series: vec![Series {
            points: vec![(0.0, -1.0), (1.0, 0.0)],
            ..Series::default()
        }],
        log: true,
        ..Chart::default()
    };
    assert!(below_zero.svg().contains("no values"));
}

#[test]
fn charts_are_stacked() {
    let charts = [transfer(), run()];
    let svg = stacked_svg(&charts);
    assert!(svg.contains("viewBox=\"0 0 960 1080\""));
    assert!(
        svg.contains("y=\"40\"") && svg.contains("y=\"580\""),
        "{svg}"
    );
    assert_eq!(stacked_svg(&charts[..1]), transfer().svg());
    let png = stacked_png(&charts, 1);
    assert_eq!(rows(&png).len(), 1080 * (1 + 3 * 960));
}

#[test]
fn ticks_of_a_logarithm_are_powers() {
    let shown = |low, high| {
        let ticks = Ticks::logarithmic(low, high, 6);
        let labels: Vec<_> = ticks.values.iter().map(|v| ticks.label(*v)).collect();
        labels.join(" ")
    };
    assert_eq!(shown(0.1, 8.0), "0.1 0.2 0.5 1 2 5 10");
    assert_eq!(
        shown(3e-5, 3e-4),
        "2e\u{2212}5 5e\u{2212}5 0.0001 0.0002 0.0005"
    );
    assert_eq!(shown(1.0, 1e9), "1 100 10,000 1,000,000 1e8 1e10");
    assert_eq!(shown(3.0, 3.4), "3.0 3.1 3.2 3.3 3.4");
    assert_eq!(shown(10.0, 10.0), "9.0 9.5 10.0 10.5 11.0");
    let ticks = Ticks::logarithmic(0.1, 8.0, 6);
    assert_eq!(
        (ticks.exact(0.123_456), ticks.exact(3.0)),
        ("0.1235".into(), "3.000".into())
    );
}

#[test]
fn ticks_are_round() {
    let shown = |low, high, wanted| {
        let ticks = Ticks::around(low, high, wanted);
        let labels: Vec<_> = ticks.values.iter().map(|v| ticks.label(*v)).collect();
        labels.join(" ")
    };
    assert_eq!(shown(0.0, 600.0, 8), "0 100 200 300 400 500 600");
    assert_eq!(shown(3.05, 8.3, 6), "3 4 5 6 7 8 9");
    assert_eq!(
        shown(1.2345, 1.2391, 6),
        "1.234 1.235 1.236 1.237 1.238 1.239 1.240"
    );
    assert_eq!(
        shown(0.0, 50_000.0, 8),
        "0 10,000 20,000 30,000 40,000 50,000"
    );
    assert_eq!(shown(-0.3, 0.1, 4), "−0.3 −0.2 −0.1 0.0 0.1");
    assert_eq!(shown(2.0, 2.0, 2), "1.5 2.0 2.5");
    assert_eq!(
        Ticks::within(30.0, 620.0, 6).values,
        [100.0, 200.0, 300.0, 400.0, 500.0, 600.0]
    );
    assert_eq!(number(1_234_567.891, 2), "1,234,567.89");
    assert_eq!(number(-0.001, 2), "0.00");
    assert_eq!(number(1234.0, 0), "1234");
}

proptest! {
    #[test]
    fn ticks_hold_every_range(low in -1e6f64..1e6, width in 0f64..1e6, wanted in 1usize..12) {
        let ticks = Ticks::around(low, low + width, wanted);
        prop_assert!(ticks.low() <= low + 1e-6 && ticks.high() >= low + width - 1e-6);
        prop_assert!(ticks.values.len() >= 2 && ticks.values.len() <= wanted + 3, "{:?}", ticks);
        let mut labels: Vec<_> = ticks.values.iter().map(|v| ticks.label(*v)).collect();
        labels.dedup();
        prop_assert_eq!(labels.len(), ticks.values.len());
    }

    #[test]
    fn names_are_moved_apart(mut wanted in prop::collection::vec(0f64..400.0, 0..12)) {
        wanted.sort_by(f64::total_cmp);
        let places = layout::spread(&wanted, 18.0, 0.0, 400.0);
        prop_assert_eq!(places.len(), wanted.len());
        for pair in places.windows(2) {
            prop_assert!(pair[1] - pair[0] >= 18.0 - 1e-9);
        }
        for place in &places {
            prop_assert!((-1e-9..=400.0 + 1e-9).contains(place));
        }
    }
}
