//! What a picture is made of. Places are in pixels from the top left corner. **Pure.**

/// A colour: red, green, blue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Color(pub u8, pub u8, pub u8);

/// A picture.
#[derive(Clone, Debug, PartialEq)]
pub struct Drawing {
    /// Its width.
    pub width: u32,
    /// Its height.
    pub height: u32,
    /// What is in it, the hindmost first, on white.
    pub marks: Vec<Mark>,
}

/// One thing in a picture.
#[derive(Clone, Debug, PartialEq)]
pub enum Mark {
    /// A line through two points or more.
    Line {
        /// Where it goes.
        points: Vec<(f64, f64)>,
        /// Its colour.
        color: Color,
        /// Its width.
        width: f64,
        /// Lengths of a dash and of the gap behind it, unless it is solid.
        dash: Option<(f64, f64)>,
    },
    /// A filled shape without an outline, through which one sees what is behind it.
    Area {
        /// Its corners, in order.
        points: Vec<(f64, f64)>,
        /// Its colour.
        color: Color,
        /// How much of it is seen, from 0 to 1.
        opacity: f64,
    },
    /// A filled circle.
    Dot {
        /// Its middle.
        at: (f64, f64),
        /// Its radius.
        radius: f64,
        /// Its colour.
        color: Color,
    },
    /// A line of text.
    Text {
        /// The text.
        text: String,
        /// The point on its baseline that `anchor` means.
        at: (f64, f64),
        /// Height of the font.
        size: f64,
        /// Which part of it stands there.
        anchor: Anchor,
        /// Its colour.
        color: Color,
    },
}

impl Mark {
    /// The same so much lower.
    pub fn lower(mut self, by: f64) -> Self {
        match &mut self {
            Self::Line { points, .. } | Self::Area { points, .. } => {
                points.iter_mut().for_each(|point| point.1 += by);
            }
            Self::Dot { at, .. } | Self::Text { at, .. } => at.1 += by,
        }
        self
    }
}

/// Which part of a text stands at its point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Anchor {
    /// Its beginning.
    Start,
    /// Its middle.
    Middle,
    /// Its end.
    End,
}
