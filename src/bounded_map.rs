//! A map of bounded size. Beyond the bound, the entries that were inserted longest ago are dropped.
//! An entry that also expires has its time in its value, which the caller compares.

use hashlink::LinkedHashMap;
use std::borrow::Borrow;
use std::hash::{Hash, RandomState};

/// Map whose entries cost at most `CAPACITY` together. An entry costs 1, so that the bound is a
/// number of entries, or what [`BoundedMap::insert_with_cost`] says, for example bytes.
#[derive(Debug)]
pub struct BoundedMap<K, V, const CAPACITY: usize> {
    /// Values with their costs, the oldest first. With `RandomState`, other machines cannot choose
    /// keys that collide.
    entries: LinkedHashMap<K, (V, usize), RandomState>,
    used: usize,
}

impl<K, V, const CAPACITY: usize> Default for BoundedMap<K, V, CAPACITY> {
    fn default() -> Self {
        BoundedMap { entries: LinkedHashMap::default(), used: 0 }
    }
}

impl<K: Hash + Eq, V, const CAPACITY: usize> BoundedMap<K, V, CAPACITY> {
    /// Inserts an entry of cost 1 as the newest. Returns the earlier value of the key.
    pub fn insert(&mut self, key: K, value: V) -> Option<V> {
        self.insert_with_cost(key, value, 1)
    }

    /// Inserts an entry as the newest, and drops the oldest ones beyond the bound, in the end the
    /// new one, too. Returns the earlier value of the key.
    pub fn insert_with_cost(&mut self, key: K, value: V, cost: usize) -> Option<V> {
        let replaced = self.entries.insert(key, (value, cost));
        self.used += cost;
        let replaced = self.without_cost(replaced);
        while self.used > CAPACITY {
            self.pop_oldest();
        }
        replaced
    }

    /// Removes an entry and returns its value.
    pub fn remove(&mut self, key: &K) -> Option<V> {
        let removed = self.entries.remove(key);
        self.without_cost(removed)
    }

    /// Removes the oldest entry and returns its value.
    pub fn pop_oldest(&mut self) -> Option<V> {
        let removed = self.entries.pop_front().map(|(_, entry)| entry);
        self.without_cost(removed)
    }

    /// Value of the oldest entry.
    pub fn oldest(&self) -> Option<&V> {
        self.entries.front().map(|(_, (value, _))| value)
    }

    /// Value of `key`. Reading does not make an entry newer.
    pub fn get<Q: Hash + Eq + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        self.entries.get(key).map(|(value, _)| value)
    }

    /// Value of `key`, to be changed in place. The entry's age and cost stay.
    pub fn get_mut(&mut self, key: &K) -> Option<&mut V> {
        self.entries.get_mut(key).map(|(value, _)| value)
    }

    /// Sum of the costs.
    pub fn used(&self) -> usize {
        self.used
    }

    /// Drops all entries and frees their memory.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    fn without_cost(&mut self, entry: Option<(V, usize)>) -> Option<V> {
        let (value, cost) = entry?;
        self.used -= cost;
        Some(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Map = BoundedMap<u32, u32, 3>;

    fn keys(map: &Map) -> Vec<u32> {
        map.entries.keys().copied().collect()
    }

    #[test]
    fn entry_beyond_bound_replaces_the_one_inserted_longest_ago() {
        let mut map = Map::default();
        (1..=4).for_each(|key| assert_eq!(map.insert(key, 10 * key), None));
        assert_eq!((keys(&map), map.oldest(), map.get(&1)), (vec![2, 3, 4], Some(&20), None));
        assert_eq!((map.insert(2, 21), map.get(&3)), (Some(20), Some(&30)));
        map.insert(5, 50);
        assert_eq!((keys(&map), map.get(&2)), (vec![4, 2, 5], Some(&21)));
    }

    #[test]
    fn cost_of_entry_counts_until_it_is_replaced_or_removed() {
        let mut map = Map::default();
        map.insert_with_cost(1, 0, 2);
        map.insert(2, 0);
        map.insert_with_cost(1, 0, 1);
        assert_eq!((keys(&map), map.used()), (vec![2, 1], 2));
        assert_eq!((map.remove(&2), map.remove(&2), map.used()), (Some(0), None, 1));
        map.insert_with_cost(3, 0, 3);
        assert_eq!((keys(&map), map.used()), (vec![3], 3));
        map.insert_with_cost(4, 0, 4);
        assert_eq!((keys(&map), map.used()), (vec![], 0));
        map.clear();
        assert_eq!(map.entries.capacity(), 0);
    }
}
