//! The reduction tree: the one order in which a run's lanes are summed, whoever computes them.
//!
//! A node is a contiguous range of lanes. It splits at the largest power of two below its size, so the tree exists
//! for any number of lanes and a contiguous assignment is covered by few nodes. Floating-point sums depend on their
//! order; since sums are taken only along this tree, they depend on the number of lanes and on nothing else.

use std::fmt;

use crate::ids::Lane;

/// A node of the reduction tree: `size` lanes from `first` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Node {
    /// First lane.
    pub first: Lane,
    /// Number of lanes, at least one.
    pub size: u32,
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.size == 1 {
            write!(f, "lane {}", self.first)
        } else {
            write!(f, "lanes {}-{}", self.first, self.end() - 1)
        }
    }
}

impl Node {
    /// The leaf of one lane.
    pub fn leaf(lane: Lane) -> Self {
        Self {
            first: lane,
            size: 1,
        }
    }

    /// One past the last lane.
    pub fn end(self) -> Lane {
        self.first + self.size
    }

    /// The lanes of this node.
    pub fn lanes(self) -> std::ops::Range<Lane> {
        self.first..self.end()
    }

    /// Whether all lanes of `other` are lanes of `self`.
    pub fn contains(self, other: Node) -> bool {
        self.first <= other.first && other.end() <= self.end()
    }

    /// The two children, or `None` for a leaf.
    pub fn children(self) -> Option<(Node, Node)> {
        if self.size < 2 {
            return None;
        }
        let left = 1 << (self.size - 1).ilog2();
        Some((
            Node {
                first: self.first,
                size: left,
            },
            Node {
                first: self.first + left,
                size: self.size - left,
            },
        ))
    }
}

/// The tree over a run's lanes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tree {
    lanes: u32,
}

impl Tree {
    /// The tree over `lanes` lanes, at least one.
    pub fn new(lanes: u32) -> Self {
        assert!(lanes > 0, "a run has at least one lane");
        Self { lanes }
    }

    /// The node of all lanes.
    pub fn root(self) -> Node {
        Node {
            first: 0,
            size: self.lanes,
        }
    }

    /// Whether `node` is a node of this tree.
    pub fn has(self, node: Node) -> bool {
        let mut at = self.root();
        if node.size == 0 || node.first >= self.lanes || node.size > self.lanes - node.first {
            return false;
        }
        while at != node {
            match at.children() {
                Some((left, right)) if left.contains(node) => (at, _) = (left, right),
                Some((_, right)) if right.contains(node) => at = right,
                _ => return false,
            }
        }
        true
    }

    /// The parent and the sibling of a node of this tree; `None` for the root. `left` says that `node` is the left child.
    pub fn family(self, node: Node) -> Option<Family> {
        let mut at = self.root();
        while let Some((left, right)) = at.children() {
            if left == node {
                return Some(Family {
                    parent: at,
                    sibling: right,
                    is_left: true,
                });
            }
            if right == node {
                return Some(Family {
                    parent: at,
                    sibling: left,
                    is_left: false,
                });
            }
            at = if left.contains(node) { left } else { right };
        }
        None
    }

    /// The fewest nodes that cover exactly the lanes `range`, from left to right.
    pub fn cover(self, range: std::ops::Range<Lane>) -> Vec<Node> {
        let mut nodes = Vec::new();
        let mut open = vec![self.root()];
        while let Some(node) = open.pop() {
            if node.end() <= range.start || range.end <= node.first {
                continue;
            }
            if range.start <= node.first && node.end() <= range.end {
                nodes.push(node);
                continue;
            }
            let (left, right) = node
                .children()
                .expect("a leaf is inside or outside a range");
            open.push(right);
            open.push(left);
        }
        nodes
    }

    /// Sums one value per lane along the tree.
    pub fn sum(self, lanes: &[f64]) -> f64 {
        assert_eq!(lanes.len(), self.lanes as usize, "one value for each lane");
        fn at(node: Node, lanes: &[f64]) -> f64 {
            match node.children() {
                None => lanes[node.first as usize],
                Some((left, right)) => at(left, lanes) + at(right, lanes),
            }
        }
        at(self.root(), lanes)
    }
}

/// A node's nearest relatives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Family {
    /// The node that is the sum of this node and its sibling.
    pub parent: Node,
    /// The other child of the parent.
    pub sibling: Node,
    /// Whether this node is the left child.
    pub is_left: bool,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn six_lanes_split_at_powers_of_two() {
        let tree = Tree::new(6);
        let (left, right) = tree.root().children().unwrap();
        assert_eq!((left.first, left.size), (0, 4));
        assert_eq!((right.first, right.size), (4, 2));
        let shown: Vec<_> = tree.cover(1..6).iter().map(Node::to_string).collect();
        assert_eq!(shown, ["lane 1", "lanes 2-3", "lanes 4-5"]);
    }

    proptest! {
        #[test]
        fn a_cover_tiles_its_range_with_nodes_of_the_tree(lanes in 1u32..200, a in 0u32..200, b in 0u32..200) {
            let (start, end) = (a.min(b).min(lanes), a.max(b).min(lanes));
            let tree = Tree::new(lanes);
            let mut at = start;
            for node in tree.cover(start..end) {
                prop_assert!(tree.has(node));
                prop_assert_eq!(node.first, at);
                at = node.end();
            }
            prop_assert_eq!(at, end);
        }

        #[test]
        fn families_agree_with_children(lanes in 1u32..100) {
            let tree = Tree::new(lanes);
            let mut open = vec![tree.root()];
            prop_assert!(tree.family(tree.root()).is_none());
            while let Some(node) = open.pop() {
                if let Some((left, right)) = node.children() {
                    prop_assert_eq!(tree.family(left), Some(Family { parent: node, sibling: right, is_left: true }));
                    prop_assert_eq!(tree.family(right), Some(Family { parent: node, sibling: left, is_left: false }));
                    open.extend([left, right]);
                }
            }
        }

        #[test]
        fn nothing_but_nodes_is_in_the_tree(lanes in 1u32..40, first in 0u32..50, size in 0u32..50) {
            let tree = Tree::new(lanes);
            let node = Node { first, size };
            let mut open = vec![tree.root()];
            let mut found = false;
            while let Some(at) = open.pop() {
                found |= at == node;
                open.extend(at.children().into_iter().flat_map(|(l, r)| [l, r]));
            }
            prop_assert_eq!(tree.has(node), found);
        }
    }
}
