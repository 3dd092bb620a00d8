//! Round numbers for an axis, and how they are written. **Pure.**

/// Numbers that stand along an axis, from its lower to its upper end.
#[derive(Clone, Debug, PartialEq)]
pub struct Ticks {
    /// The numbers.
    pub values: Vec<f64>,
    /// Digits behind the point that they need; absent where each needs its own.
    pub decimals: Option<usize>,
}

/// From this ratio of the ends on, a logarithmic axis has powers of ten and their like; below, it has what a linear one has.
const WIDE: f64 = 4.0;

impl Ticks {
    /// About `wanted` multiples of 1, 2 or 5 times a power of ten: the first at or below `low`, the last at or above
    /// `high`. Both must be finite, and `low` at most `high`.
    pub fn around(low: f64, high: f64, wanted: usize) -> Self {
        let (low, high) = apart(low, high);
        let step = round_step((high - low) / wanted.max(1) as f64);
        // What rounding adds to a bound that is a multiple itself must not cost a whole step.
        let first = (low / step + 1e-9).floor();
        let last = (high / step - 1e-9).ceil();
        let count = (last - first) as usize;
        Self {
            values: (0..=count).map(|i| (first + i as f64) * step).collect(),
            decimals: Some(decimals(step)),
        }
    }

    /// The same for a logarithmic axis: powers of ten, also twice and five times as much where there is room. `low` must be
    /// above 0.
    pub fn logarithmic(low: f64, high: f64, wanted: usize) -> Self {
        if high / low < WIDE {
            let ticks = Self::around(low, high, wanted);
            if ticks.low() > 0.0 {
                return ticks;
            }
        }
        let first = low.log10().floor() as i32;
        let last = high.log10().ceil() as i32;
        let decades = (last - first).max(1) as usize;
        let factors: &[f64] = match 3 * decades <= 2 * wanted {
            true => &[1.0, 2.0, 5.0],
            false => &[1.0],
        };
        let stride = decades.div_ceil(wanted.max(1));
        let powers = (first..=last + stride as i32).step_by(stride);
        let all: Vec<f64> = powers
            .flat_map(|power| factors.iter().map(move |f| f * 10f64.powi(power)))
            .collect();
        let begin = all.iter().rposition(|v| *v <= low * (1.0 + 1e-9));
        let end = all.iter().position(|v| *v >= high * (1.0 - 1e-9));
        let (begin, end) = (begin.unwrap_or(0), end.unwrap_or(all.len() - 1));
        // One number is no axis.
        let end = end.max(begin + 1).min(all.len() - 1);
        Self {
            values: all[begin..=end].to_vec(),
            decimals: None,
        }
    }

    /// Those of the numbers that lie between `low` and `high`, of an axis that ends where its values do.
    pub fn within(low: f64, high: f64, wanted: usize) -> Self {
        let (low, high) = apart(low, high);
        let mut ticks = Self::around(low, high, wanted);
        let crumb = (high - low) * 1e-9;
        let inside = |v: &f64| *v >= low - crumb && *v <= high + crumb;
        ticks.values.retain(inside);
        ticks
    }

    /// The lower end of the axis.
    pub fn low(&self) -> f64 {
        self.values[0]
    }

    /// The upper end of the axis.
    pub fn high(&self) -> f64 {
        self.values[self.values.len() - 1]
    }

    /// One of the numbers, as text.
    pub fn label(&self, value: f64) -> String {
        match self.decimals {
            Some(decimals) => number(value, decimals),
            None => significant(value, 1),
        }
    }

    /// A number that lies between them, as text: a hundred times as exact.
    pub fn exact(&self, value: f64) -> String {
        match self.decimals {
            Some(decimals) => number(value, decimals + 2),
            None => significant(value, 4),
        }
    }
}

/// A range that is wide enough to be divided.
pub fn apart(low: f64, high: f64) -> (f64, f64) {
    let least = (low.abs().max(high.abs()) * 1e-6).max(1e-12);
    match high - low > least {
        true => (low, high),
        false => {
            let margin = (low.abs() / 10.0).max(0.5);
            (low - margin, high + margin)
        }
    }
}

/// The smallest of 1, 2, 5 times a power of ten that is not below `step`.
fn round_step(step: f64) -> f64 {
    let power = 10f64.powf(step.log10().floor());
    let factors = [1.0, 2.0, 5.0];
    let factor = factors
        .into_iter()
        .find(|f| f * power >= step * (1.0 - 1e-9));
    factor.unwrap_or(10.0) * power
}

fn decimals(step: f64) -> usize {
    (-step.log10() - 1e-9).ceil().clamp(0.0, 12.0) as usize
}

/// A number with that many digits that count, and a power of ten where it is very small or very large.
fn significant(value: f64, digits: usize) -> String {
    let power = value.abs().log10().floor();
    if value != 0.0 && !(-4.0..7.0).contains(&power) {
        let text = format!("{value:.*e}", digits.saturating_sub(1));
        return text.replace('-', "\u{2212}");
    }
    let power = if value == 0.0 { 0.0 } else { power };
    number(value, (digits as f64 - 1.0 - power).max(0.0) as usize)
}

/// A number with that many digits behind the point, and commas between thousands from 10,000 on.
pub fn number(value: f64, decimals: usize) -> String {
    let text = format!("{value:.decimals$}");
    // Zero has no sign.
    let zero = text.bytes().all(|b| matches!(b, b'-' | b'0' | b'.'));
    let (sign, digits) = match text.strip_prefix('-') {
        Some(digits) => (if zero { "" } else { "\u{2212}" }, digits),
        None => ("", text.as_str()),
    };
    let (whole, rest) = digits.split_at(digits.find('.').unwrap_or(digits.len()));
    let mut grouped = String::new();
    for (i, digit) in whole.chars().enumerate() {
        if i > 0 && whole.len() > 4 && (whole.len() - i).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    format!("{sign}{grouped}{rest}")
}
