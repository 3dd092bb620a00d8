//! The figures of a step as one line that is never wider than it may be: what is not known is left out, and where the
//! line is too long, the figures that matter least go first. **Pure.**

use cohort_common::api::StepEvent;
use cohort_common::spec::human_count;
use unicode_width::UnicodeWidthStr;

use crate::output::duration;

/// Between two figures.
const GAP: &str = "  ";

/// A figure in words, and how much it matters: 0 is never left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Figure {
    /// What is left out first has the highest rank.
    pub rank: u8,
    /// The words.
    pub text: String,
}

impl Figure {
    /// A figure.
    pub fn new(rank: u8, text: impl Into<String>) -> Self {
        let text = text.into();
        Self { rank, text }
    }
}

/// The line of a step: where the run stands, its figures, and when it will be done.
pub fn line(step: &StepEvent, eta_seconds: Option<f64>, width: usize) -> String {
    let percent = 100 * step.step / step.steps.max(1);
    let at = format!("step {}/{} {percent:>3} %", step.step, step.steps);
    let mut all = vec![Figure::new(0, at)];
    all.extend(figures(step));
    all.extend(eta(eta_seconds));
    fit(&all, width)
}

/// What is known of a step, as it is shown in a line.
pub fn figures(step: &StepEvent) -> Vec<Figure> {
    let speed = Some(step.tokens_per_second).filter(|speed| *speed > 0.0);
    let known = [
        Some(Figure::new(1, format!("loss {:.4}", step.loss))),
        step.skipped
            .then(|| Figure::new(1, "skipped by the watchdog")),
        step.bits_per_byte
            .map(|bits| Figure::new(4, format!("bpb {bits:.3}"))),
        Some(Figure::new(5, format!("norm {:.3}", step.grad_norm))),
        Some(Figure::new(8, format!("lr {:.2e}", step.learning_rate))),
        speed.map(|speed| Figure::new(3, format!("{} tok/s", human_count(speed as u64)))),
        step.mfu
            .map(|mfu| Figure::new(6, format!("MFU {:.0} %", 100.0 * mfu))),
        Some(Figure::new(7, format!("epoch {:.2}", step.epoch))),
    ];
    known.into_iter().flatten().collect()
}

/// How long a run takes until its last step, where that is known.
pub fn eta(seconds: Option<f64>) -> Option<Figure> {
    let seconds = seconds.filter(|seconds| seconds.is_finite())?;
    Some(Figure::new(2, format!("ETA {}", duration(seconds))))
}

/// The figures in one line of at most `width` columns.
pub fn fit(figures: &[Figure], width: usize) -> String {
    let mut left: Vec<&Figure> = figures.iter().collect();
    loop {
        let texts: Vec<&str> = left.iter().map(|figure| figure.text.as_str()).collect();
        let line = texts.join(GAP);
        let last = left.iter().map(|figure| figure.rank).max();
        match last {
            Some(rank) if rank > 0 && line.width() > width => {
                left.retain(|figure| figure.rank < rank);
            }
            _ => return clip(&line, width),
        }
    }
}

/// The beginning of a text that takes at most `width` columns; what is cut ends with an ellipsis.
pub fn clip(text: &str, width: usize) -> String {
    if text.width() <= width {
        return text.into();
    }
    let mut cut = String::new();
    let mut used = 1;
    for letter in text.chars() {
        let mut bytes = [0; 4];
        used += letter.encode_utf8(&mut bytes).width();
        if used > width {
            break;
        }
        cut.push(letter);
    }
    match width {
        0 => String::new(),
        _ => cut + "…",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step() -> StepEvent {
        StepEvent {
            run: "tiny-1".into(),
            step: 120,
            steps: 2000,
            loss: 2.34561,
            grad_norm: 0.8123,
            learning_rate: 3e-4,
            tokens: 61_440,
            tokens_per_second: 33_333.0,
            epoch: 0.1234,
            bits_per_byte: Some(1.2341),
            skipped: false,
            mfu: Some(0.412),
        }
    }

    #[test]
    fn a_line_has_all_that_is_known() {
        assert_eq!(
            line(&step(), Some(62.0), usize::MAX),
            "step 120/2000   6 %  loss 2.3456  bpb 1.234  norm 0.812  lr 3.00e-4  33.3k tok/s  MFU 41 %  epoch 0.12  \
             ETA 1 min 02 s"
        );
        let unknown = StepEvent {
            bits_per_byte: None,
            mfu: None,
            tokens_per_second: 0.0,
            ..step()
        };
        assert_eq!(
            line(&unknown, None, usize::MAX),
            "step 120/2000   6 %  loss 2.3456  norm 0.812  lr 3.00e-4  epoch 0.12"
        );
        assert_eq!(eta(Some(f64::NAN)), None);
        let skipped = StepEvent {
            loss: f64::NAN,
            skipped: true,
            ..unknown
        };
        assert_eq!(
            line(&skipped, None, 60),
            "step 120/2000   6 %  loss NaN  skipped by the watchdog"
        );
    }

    #[test]
    fn a_narrow_line_leaves_out_what_matters_least_and_never_wraps() {
        let at = |width| line(&step(), Some(62.0), width);
        assert_eq!(
            at(80),
            "step 120/2000   6 %  loss 2.3456  bpb 1.234  33.3k tok/s  ETA 1 min 02 s"
        );
        assert_eq!(at(50), "step 120/2000   6 %  loss 2.3456  ETA 1 min 02 s");
        assert_eq!(at(33), "step 120/2000   6 %  loss 2.3456");
        assert_eq!(at(10), "step 120/…");
        for width in 0..140 {
            assert!(at(width).width() <= width, "{width}");
        }
    }

    #[test]
    fn wide_letters_take_two_columns() {
        assert_eq!(clip("日本語", 6), "日本語");
        assert_eq!(clip("日本語", 5), "日本…");
        assert_eq!(clip("日本語", 4), "日…");
        assert_eq!(clip("日本語", 1), "…");
        assert_eq!(clip("日本語", 0), "");
    }
}
