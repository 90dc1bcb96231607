-- The shop's own tables. This file can be run again at any time.

create schema if not exists orders;

-- opening + delivered - on_hand is what orders have taken; served is the part of it that had been on back-order.
-- deliveries: how many came so far; the next restock is named by it.
create table if not exists orders.stock (
    product_id int primary key,
    name text not null,
    opening int not null,
    on_hand int not null check (on_hand >= 0),
    served int not null default 0,
    delivered int not null default 0,
    deliveries int not null default 0,
    is_on_order boolean not null default false
) with (fillfactor = 20);  -- few rows, often updated: room for new versions beside the old ones

-- What orders found too little of; only ever inserted, so that they do not wait for each other to say so.
create table if not exists orders.backorder (
    product_id int not null,
    order_ref text not null,
    quantity int not null,
    primary key (product_id, order_ref)
);

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

-- Where the carrier's API is: no row for a shop that has none.
create table if not exists orders.carrier (
    is_one boolean primary key default true check (is_one),
    address text not null
);

-- orders.lock_stock(): one transaction at a time takes from the stock; the lock ends with it.
-- Up to a hundred orders share one commit, and together they touch every product. Locking rows in product order keeps two
-- orders apart, but not two commits of a hundred orders each: tried, they deadlocked for ever. One lock before all cannot.
create or replace function orders.lock_stock() returns void
language sql
as $$ select pg_advisory_xact_lock('orders.stock'::regclass::oid::int, 0) $$;

-- orders.reserve(…): takes all lines of an order from the stock, or none: then they are on back-order.
--   i_is_backordered  whether they are already
--   is_reserved       whether the lines were taken
--   to_restock        products that somebody has to order now, because they are short and no delivery is on the way;
--                     deliveries: the number of the delivery to order for each of them
create or replace function orders.reserve(i_ref text, i_products int[], i_quantities int[], i_is_backordered boolean,
    out is_reserved boolean, out to_restock int[], out deliveries int[])
language plpgsql
as $$
declare
    v_is_on_the_way boolean;
begin
    is_reserved := false;
    to_restock := '{}';
    deliveries := '{}';
    -- Look before you lock: most orders that find too little find it on order.
    select bool_and(s.is_on_order) into v_is_on_the_way
    from unnest(i_products, i_quantities) w(product_id, quantity) join orders.stock s using (product_id)
    where s.on_hand < w.quantity;

    if v_is_on_the_way is not true then
        perform orders.lock_stock();
        -- A later statement than the lock: it sees what the last owner of the lock has committed.
        update orders.stock s
        set on_hand = s.on_hand - w.quantity, served = s.served + case when i_is_backordered then w.quantity else 0 end
        from unnest(i_products, i_quantities) w(product_id, quantity)
        where s.product_id = w.product_id and not exists (
            select from unnest(i_products, i_quantities) x(product_id, quantity) left join orders.stock t using (product_id)
            where t.product_id is null or t.on_hand < x.quantity);
        is_reserved := found;
        if is_reserved then
            return;
        end if;
        with ordered as (
            update orders.stock s set is_on_order = true
            from unnest(i_products, i_quantities) w(product_id, quantity)
            where s.product_id = w.product_id and s.on_hand < w.quantity and not s.is_on_order
            returning s.product_id, s.deliveries)
        select coalesce(array_agg(o.product_id), '{}'), coalesce(array_agg(o.deliveries), '{}') into to_restock, deliveries
        from ordered o;
    end if;

    if not i_is_backordered then
        insert into orders.backorder (product_id, order_ref, quantity)
        select s.product_id, i_ref, w.quantity
        from unnest(i_products, i_quantities) w(product_id, quantity) join orders.stock s using (product_id);
        if (select count(*) from orders.stock s where s.product_id = any (i_products)) < cardinality(i_products) then
            raise exception 'there is no product %', (select min(w.product_id) from unnest(i_products) w(product_id)
                where w.product_id not in (select s.product_id from orders.stock s));
        end if;
    end if;
end
$$;

-- orders.receive(product, delivery): puts a delivery into the stock: what back-orders lack, and as much again for whoever comes.
-- Result: its units; null when that delivery is in the stock already.
create or replace function orders.receive(i_product int, i_delivery int) returns int
language plpgsql
as $$
declare
    v_units int;
begin
    perform orders.lock_stock();
    select greatest(b.waiting - s.on_hand, 0) + greatest(b.waiting, 200) into v_units
    from orders.stock s, lateral (
        select coalesce(sum(o.quantity), 0) - s.served as waiting from orders.backorder o where o.product_id = s.product_id) b
    where s.product_id = i_product and s.deliveries = i_delivery;
    update orders.stock s
    set on_hand = s.on_hand + v_units, delivered = s.delivered + v_units, deliveries = s.deliveries + 1, is_on_order = false
    where s.product_id = i_product and s.deliveries = i_delivery;
    return v_units;
end
$$;
