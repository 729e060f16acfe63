-- No event gets an id up to this one any more: the highest may be deleted with their runs, and whoever reads events
-- behind an id that is known would miss a new one that got it again.
ALTER TABLE change_feed ADD COLUMN event_floor INTEGER NOT NULL DEFAULT 0;
