-- The shop's own tables. This file can be run again at any time.

create schema if not exists orders;

-- promised: units that orders on back-order wait for. deliveries: how many came so far; the next restock is named by it.
-- opening + delivered - on_hand is what orders have taken.
create table if not exists orders.stock (
    product_id int primary key,
    name text not null,
    opening int not null,
    on_hand int not null check (on_hand >= 0),
    promised int not null default 0 check (promised >= 0),
    delivered int not null default 0,
    deliveries int not null default 0,
    is_on_order boolean not null default false
) with (fillfactor = 20);  -- few rows, often updated: room for new versions beside the old ones

-- The primary key is the proof that nobody is charged twice: a second charge of a line could not be stored.
create table if not exists orders.ledger (
    order_ref text not null,
    line int not null,
    product_id int not null,
    quantity int not null,
    gross numeric(14, 4) not null,
    net numeric(14, 4) not null,
    primary key (order_ref, line)
);

-- orders.lock_stock(): one transaction at a time changes the stock; the lock ends with it.
-- Up to a hundred orders share one commit, and together they touch every product. Locking rows in product order keeps two
-- orders apart, but not two commits of a hundred orders each: those deadlock. One lock before all row locks cannot.
create or replace function orders.lock_stock() returns void
language sql
as $$ select pg_advisory_xact_lock('orders.stock'::regclass::oid::int, 0) $$;

-- orders.reserve(…): takes all lines of an order from the stock, or none.
--   i_is_promised  whether the order is on back-order already: then its units are among the promised ones
--   is_reserved    whether the lines were taken; if not, all of them are promised now
--   to_restock     products that somebody has to order now, because more is promised than there is;
--                  deliveries: the number of the delivery to order for each of them
create or replace function orders.reserve(i_products int[], i_quantities int[], i_is_promised boolean,
    out is_reserved boolean, out to_restock int[], out deliveries int[])
language plpgsql
as $$
declare
    v_rows int;
begin
    is_reserved := false;
    to_restock := '{}';
    deliveries := '{}';
    -- Whoever waits for a delivery only looks whether it came: no lock, no write.
    if i_is_promised and exists (
        select from unnest(i_products, i_quantities) w(product_id, quantity) join orders.stock s using (product_id)
        where s.on_hand < w.quantity and s.is_on_order)
    then
        return;
    end if;

    perform orders.lock_stock();
    -- From here on, statements see what the last owner of the lock committed. Promised units are not free for newcomers.
    update orders.stock s
    set on_hand = s.on_hand - w.quantity, promised = s.promised - case when i_is_promised then w.quantity else 0 end
    from unnest(i_products, i_quantities) w(product_id, quantity)
    where s.product_id = w.product_id and not exists (
        select from unnest(i_products, i_quantities) x(product_id, quantity) join orders.stock t using (product_id)
        where t.on_hand - case when i_is_promised then 0 else t.promised end < x.quantity);
    is_reserved := found;
    if is_reserved then
        return;
    end if;

    if not i_is_promised then
        update orders.stock s set promised = s.promised + w.quantity
        from unnest(i_products, i_quantities) w(product_id, quantity) where s.product_id = w.product_id;
    end if;
    with ordered as (
        update orders.stock s set is_on_order = true
        where s.product_id = any (i_products) and s.on_hand < s.promised and not s.is_on_order
        returning s.product_id, s.deliveries)
    select coalesce(array_agg(o.product_id), '{}'), coalesce(array_agg(o.deliveries), '{}') into to_restock, deliveries
    from ordered o;
end
$$;

-- orders.receive(product, delivery): puts a delivery into the stock: what is promised, and as much again for the next orders.
-- Result: its units; null when that delivery is in the stock already.
create or replace function orders.receive(i_product int, i_delivery int) returns int
language plpgsql
as $$
declare
    v_units int;
begin
    perform orders.lock_stock();
    select greatest(s.promised - s.on_hand, 0) + greatest(s.promised, 100) into v_units
    from orders.stock s where s.product_id = i_product and s.deliveries = i_delivery;
    update orders.stock s
    set on_hand = s.on_hand + v_units, delivered = s.delivered + v_units, deliveries = s.deliveries + 1, is_on_order = false
    where s.product_id = i_product and s.deliveries = i_delivery;
    return v_units;
end
$$;
